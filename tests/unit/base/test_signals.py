"""Signals raise where they arrive, or wait; each in a process of its own."""

import subprocess
import sys
import textwrap

import pytest


def ran(code: str, **environment: str) -> subprocess.CompletedProcess:
    head = """
        import os, signal, sys, time
        from qdm_lightning.base import signals
        from qdm_lightning.base.signals import Interrupted, check, deferred, handled, received
        def send(number): os.kill(os.getpid(), number)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it for what they run in the background
    """
    code = textwrap.dedent(head) + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment or None)


def test_a_signal_raises_or_waits():
    done = ran(
        """
        with handled():
            try:
                with deferred():
                    assert received() is None
                    send(signal.SIGTERM)
                    send(signal.SIGTERM)
                    check()  # it is deferred
                    assert received() == signal.SIGTERM
                    try:
                        with deferred(False):
                            raise AssertionError("a signal that came raises where none is deferred")
                    except Interrupted:
                        print("inside")
                    check()
                check()
            except Interrupted as end:
                assert isinstance(end, KeyboardInterrupt)
                print(signals.status(end.number))
        with handled():
            try:
                send(signal.SIGINT)
            except Interrupted as end:
                print(signals.status(end.number))
        with handled(), deferred():
            send(signal.SIGTERM)
            try:
                send(signal.SIGINT)  # a second one, by hand, is not deferred, and the first one tells
            except Interrupted as end:
                print(signals.status(end.number))
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        """
    )
    assert (done.stdout.split(), done.stderr, done.returncode) == (["inside", "143", "130", "143"], "", 0)


def test_what_is_ignored_stays_so():
    done = ran(
        """
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with handled():
            send(signal.SIGINT)
            assert received() is None
        """
    )
    assert (done.stderr, done.returncode) == ("", 0)


def test_a_process_that_waits_in_c_ends_all_the_same():
    """A mutex that is never released stands for a collective operation: there the main thread runs no handler."""
    done = ran(
        """
        import ctypes, threading
        signals.STUCK = 0.2
        libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(128)
        with handled():
            threading.Timer(0.2, send, [signal.SIGTERM]).start()
            libc.pthread_mutex_lock(mutex)
            libc.pthread_mutex_lock(mutex)
        """
    )
    assert done.returncode == 143
    assert done.stderr == "interrupted while waiting for another process; the same command goes on\n"


@pytest.mark.parametrize("requeued", [True, False])
def test_slurms_notice_puts_the_job_back(requeued, tmp_path):
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path / "called"}\n')
    (tmp_path / "scontrol").chmod(0o755)
    done = ran(
        f"""
        with handled():
            try:
                send(signal.{"SIGUSR1" if requeued else "SIGTERM"})
            except Interrupted as end:
                signals.requeue(end.number)
                sys.exit(signals.status(end.number))
        """,
        SLURM_JOB_ID="7",
        PATH=f"{tmp_path}:/usr/bin:/bin",
    )
    assert done.returncode == (138 if requeued else 143), done.stderr
    assert (tmp_path / "called").is_file() == requeued
    assert not requeued or (tmp_path / "called").read_text() == "requeue 7\n"
