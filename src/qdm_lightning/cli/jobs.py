"""One job of a sweep, as a launcher calls it: a process of its own that goes on in the job's folder, `train run=<folder>`.

So nothing passes from one job to the next (W&B run, compiled kernels, the ports and ranks that Lightning leaves in the
environment), a job that is killed takes none with it, and a new job, a half-done one, and one with several devices are the
same case.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from qdm_lightning.base.checks import one_line
from qdm_lightning.base.ranks import RENDEZVOUS, rank
from qdm_lightning.cli.compose import given_beside_run
from qdm_lightning.cli.messages import quoted
from qdm_lightning.cli.schema import cores, plain
from qdm_lightning.display.progress import duration
from qdm_lightning.runs.caches import mark_cache
from qdm_lightning.runs.folder import CONFIG, LOCK, is_finished, read_config, write_config

GRACE = 60.0
"""Seconds that a job has for its checkpoint when the sweep is ended."""

OUTPUT_FILE = "output.log"
"""What a job printed, where jobs run at once."""


def launched(cfg: DictConfig, config_dir: str | None, folders: Sequence[Path]) -> str:
    """What a launcher calls for each job, in this process or another; arguments and result as of `run_job`."""
    settings = HydraConfig.get()
    return run_job(Path(settings.runtime.output_dir), cfg, settings, config_dir=config_dir, folders=folders)


def run_job(folder: Path, cfg: DictConfig, settings: Any, *, config_dir: str | None, folders: Sequence[Path]) -> str:
    """Start the job's own process, and wait for it.

    Args:
        folder: where the job runs.
        cfg: configuration of the job.
        settings: Hydra's node: launcher, sweeper and what was typed.
        config_dir: folder of the user's own options.
        folders: of all jobs of the sweep.

    Returns:
        Why it failed; empty if it did not.
    """
    if not rank():
        _wait_for(folder)
    if is_finished(folder):
        return ""
    if not (folder / CONFIG).is_file():  # a half-done job keeps its threads: they change the last bits
        cfg.trainer.threads = cfg.trainer.threads or _threads(settings, len(folders), cfg.trainer.devices)
        write_config(folder, plain(cfg))
    for cache in (cfg.paths.cache, cfg.data.get("cache")):  # the job's own process takes no other from a stored file
        if cache:
            mark_cache(cache)
    begin = time.monotonic()
    alone = str(settings.launcher._target_).endswith(".BasicLauncher")
    log = None if alone else folder / (f"output_rank{rank()}.log" if rank() else OUTPUT_FILE)
    if log:
        print(f"started: {folder.name}", flush=True)
    status = _run(_arguments(folder, config_dir, settings), _environment(folder), log)
    reason = "" if status == 0 else _explained(status, log)
    took = time.monotonic() - begin
    ended = f"failed: {folder.name}, {duration(took)}, {reason}" if reason else f"done: {folder.name}, {duration(took)}"
    print(f"{ended}{_what_is_left(took, settings, folders)}", flush=True)
    return reason


def _what_is_left(took: float, settings: Any, folders: Sequence[Path]) -> str:
    """How many jobs of the sweep are not done, and how long they take if each takes `took` seconds."""
    left = sum(not is_finished(folder) for folder in folders)
    about = duration(took * left / min(left, _at_once(settings, len(folders)))) if left else ""
    return f"; {left} of {len(folders)} left, about {about} at this pace" if left else ""


def _wait_for(folder: Path) -> None:
    """A process that an earlier, interrupted sweep left behind may still train here."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for the process that still runs {folder.name}", flush=True)
        lock.acquire()
    lock.release()


def _threads(settings: Any, count: int, devices: int | str) -> int:
    """Threads of each process of a job: its share of the cores where jobs run at once; 0 (torch's choice) where they do not."""
    launcher, processes = settings.launcher, devices if isinstance(devices, int) else 1
    if launcher.get("cpus_per_task"):
        return max(1, launcher.cpus_per_task * launcher.tasks_per_node // processes)
    if str(launcher._target_).endswith(".BasicLauncher"):
        return 0
    return max(1, cores() // _at_once(settings, count) // processes)


def _at_once(settings: Any, count: int) -> int:
    """Jobs of `count` that run at the same time, as far as the launcher's settings say."""
    launcher = settings.launcher
    if "n_jobs" in launcher:  # joblib: -1 is all cores, -2 all but one
        at_once = launcher.n_jobs if launcher.n_jobs > 0 else cores() + 1 + launcher.n_jobs
    elif str(launcher._target_).endswith(".LocalLauncher"):  # submitit starts all of them
        at_once = settings.sweeper.max_batch_size or count
    else:
        at_once = launcher.get("array_parallelism") or 1
    return max(1, min(at_once, count))


def _arguments(folder: Path, config_dir: str | None, settings: Any) -> list[str]:
    """`run=` and what may be given beside it."""
    flags = ["--config-dir", config_dir] if config_dir else []
    given = given_beside_run(settings.overrides.task)
    return [sys.executable, "-m", "qdm_lightning.train", *flags, *given, f"run={quoted(folder)}"]


def _environment(folder: Path) -> dict[str, str]:
    left_out = () if "SLURM_JOB_ID" in os.environ else RENDEZVOUS  # there all processes of a job are started from without
    threads = str(read_config(folder)["trainer"]["threads"])
    limits = {"OMP_NUM_THREADS": threads, "TORCHINDUCTOR_COMPILE_THREADS": threads} if threads != "0" else {}
    return {name: value for name, value in os.environ.items() if name not in left_out} | limits


def _run(command: list[str], environment: dict[str, str], log: Path | None) -> int:
    """Run a job's process to its end, and return its status; what ends this process early ends that one first, which writes
    its checkpoint."""
    with _slurm_signals_kept(), log.open("ab") if log else nullcontext() as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT if log else None)
    try:
        return process.wait()
    except BaseException:
        process.send_signal(signal.SIGINT if "SLURM_JOB_ID" in os.environ else signal.SIGTERM)  # see `_slurm_signals_kept`
        try:
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        finally:  # a second Ctrl-C, or it took too long
            process.kill()
            process.wait()
        raise


def end_jobs(number: int) -> None:
    """End the jobs that run below this process, and wait until each has written its checkpoint.

    A launcher may keep jobs in processes of its own, which it kills with all that is below them. Those wait meanwhile, or they
    would start the next job, and are killed.
    """
    try:
        import psutil  # type: ignore[import-untyped]  # of the extra `sweeps`, as the launchers are
    except ModuleNotFoundError:
        return  # jobs go on from their last checkpoints

    below = psutil.Process().children(recursive=True)
    jobs = [process for process in below if "qdm_lightning.train" in _asked(process, "cmdline", ())]
    keepers = {above for job in jobs for above in _asked(job, "parents", ()) if above in below and above not in jobs}
    for keeper in keepers:
        _asked(keeper, "suspend")
    for job in jobs:
        _asked(job, "terminate")
    end = time.monotonic() + GRACE
    while time.monotonic() < end and any(_asked(job, "status", "zombie") != "zombie" for job in jobs):
        time.sleep(0.1)
    for process in [*jobs, *keepers]:
        _asked(process, "kill")


def _asked(process: Any, method: str, otherwise: Any = None) -> Any:
    """What a method of a process returns; `otherwise` where it has ended."""
    import psutil

    try:
        return getattr(process, method)()
    except psutil.Error:
        return otherwise


@contextmanager
def _slurm_signals_kept() -> Iterator[None]:
    """SLURM tells every process of a job that the job is preempted. That is for submitit in this process, which requeues it;
    a job's process that died of it would look like one that failed."""
    kept = {signal.SIGUSR2, signal.SIGTERM} if "SLURM_JOB_ID" in os.environ else set()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, kept)  # inherited
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _explained(status: int, log: Path | None) -> str:
    if status < 0:
        reason = f"killed by {signal.Signals(-status).name}"
    else:
        lines = log.read_text("utf-8", "replace").strip().splitlines() if log else []
        reason = one_line(lines[-1])[:200] if lines else f"exit status {status}, see above"
    return f"{reason} ({log})" if log else reason
