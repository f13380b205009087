"""`evaluate`, `sample` and `diagnose` as they are typed: killed by force, in several processes, with bad input."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from qdm_lightning.cli.app import BAD_INPUT
from qdm_lightning.diagnose import diagnose
from qdm_lightning.display.progress import Progress
from qdm_lightning.evaluate import evaluate
from qdm_lightning.sample import sample
from qdm_lightning.training.checkpoint_io import load_checkpoint
from qdm_lightning.training.network_settings import KEY

KILLS = 4
"""Of a command at least, and until one has left something to take up; `make test-faults` has more."""

COMMANDS = {"evaluate": evaluate, "sample": sample, "diagnose": diagnose}

READY = multiprocessing.get_context("forkserver")
"""Processes that have imported everything when they begin: kills then fall on the work."""
READY.set_forkserver_preload([f"qdm_lightning.evaluation.{module}" for module in ("evaluate", "sample")])


def start(*arguments):
    command = [sys.executable, "-m", "qdm_lightning.evaluate", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_chunks(folder, count, process):
    until = time.monotonic() + 120
    while len(list(folder.rglob("features_*/*.npz"))) < count:
        assert process.exitcode is None
        assert time.monotonic() < until
        time.sleep(0.01)


def begin(command, *arguments):
    process = READY.Process(target=command, args=arguments)
    process.start()
    return process


def left_behind(run):
    """What a command made of a run: files by name, with what may differ between two times left out."""
    found = {}
    for file in sorted(path for path in run.rglob("*") if path.suffix in (".npz", ".png", ".json")):
        if file.suffix == ".npz":
            with np.load(file) as arrays:
                content = {n: (a.dtype, a.shape, a.tobytes()) for n, a in arrays.items() if n not in ("meta", "sha256")}
        elif file.suffix == ".json":
            content = {k: v for k, v in json.loads(file.read_text()).items() if k not in ("finished", "seconds", "git")}
        else:
            content = file.read_bytes()
        found[file.relative_to(run).as_posix()] = content
    return found


@pytest.mark.parametrize(
    ("command", "overrides", "made"),
    [
        (evaluate, ["num_samples=96", "chunk=16"], "evaluations"),
        (sample, ["seeds=0-95", "trajectory=true"], "images"),
    ],
    ids=["evaluate", "sample"],
)
def test_killed_at_random_moments(command, overrides, made, run_copy, tmp_path):
    """By SIGKILL, anywhere: while it sets up, draws, takes features, writes, scores. What got to its end begins again."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed of the moments: {seed}")
    overrides = [*overrides, f"paths.cache={tmp_path / 'cache'}"]
    begin(time.sleep, 0).join()  # until the server is there
    begun = time.monotonic()
    begin(command, run_copy, overrides).join()
    whole, seconds = left_behind(run_copy), time.monotonic() - begun
    assert len([name for name in whole if name.startswith(made)]) > 10
    moments, kills, taken_up, done = random.Random(seed), 0, 0, True
    while kills < KILLS or not done or not taken_up:
        if done:
            shutil.rmtree(run_copy / made)
            shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        taken_up += any((run_copy / made).rglob("*.*"))
        process = begin(command, run_copy, overrides)
        process.join(moments.uniform(0, seconds) if kills < KILLS or not taken_up else None)
        process.kill()
        process.join()
        done = process.exitcode == 0
        if done:
            assert left_behind(run_copy) == whole
        else:
            assert process.exitcode == -signal.SIGKILL
            kills += 1


def test_two_shards_at_once_and_one_of_them_killed(run_copy, tiny_run, tmp_path):
    settings = ["sampler.steps=25", "num_samples=160", "chunk=16"]
    shards = [begin(evaluate, run_copy, [*settings, f"shard={k}/2"]) for k in (1, 2)]
    wait_for_chunks(run_copy, 4, shards[1])
    shards[1].kill()
    for shard in shards:
        shard.join()
    assert [shard.exitcode for shard in shards] == [0, -signal.SIGKILL]
    assert not (run_copy / "evaluation.json").exists()
    assert 5 <= len(list(run_copy.rglob("features_*/*.npz"))) < 10
    last = evaluate(run_copy, settings, Progress("silent")).record
    whole = evaluate(tiny_run, [*settings, f"out={tmp_path / 'whole'}"], Progress("silent")).record
    assert (last["scores"], last["images"], last["warnings"]) == (whole["scores"], whole["images"], [])


def test_three_processes_of_lightning(run_copy, tiny_run, tmp_path):
    overrides = ["num_samples=96", "chunk=16"]
    ended = start(f"run={run_copy}", *overrides, "devices=3", "accelerator=cpu")
    said = ended.communicate()[0]
    assert ended.returncode == 0, said
    assert "student W4A4, ema" in said
    together = json.loads((run_copy / "evaluation.json").read_text())
    alone = evaluate(tiny_run, [*overrides, f"out={tmp_path / 'alone'}"], Progress("silent")).record
    assert (together["scores"], together["images"], together["warnings"]) == (alone["scores"], alone["images"], [])


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("evaluate", [], "run is missing: type run=<folder of a run>"),
        ("evaluate", ["run=nowhere"], "run=nowhere is not a folder"),
        ("evaluate", ["run={run}", "+unknown=1"], "unknown is not a setting"),
        ("evaluate", ["run={run}", "sampler=euler"], "sampler=euler is not an option: choose one of ddim, ddpm"),
        ("evaluate", ["run={run}", "sampler.steps=x"], "sampler.steps must be an integer"),
        ("evaluate", ["run={run}", "shard=9/8"], "shard=9/8 is not allowed"),
        ("evaluate", ["run={run}", "optimizer.lr=1"], "optimizer.lr=1 belongs to training"),
        ("evaluate", ["run={run},{run}", "-m"], "one run at a time"),
        ("evaluate", ["run={run}", "merge=true"], "64 of 64 images are missing"),
        ("sample", ["run={run}", "seeds=1-0"], "seeds=1-0 is not understood"),
        ("sample", ["run={run}", "metrics=digits"], "metrics=digits belongs to training"),
        ("diagnose", ["run={run}", "layers=nothing"], "matches no layer"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(name, arguments, message, run_copy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = {path for path in run_copy.rglob("*") if "chunks" not in path.parts and path.name != "evaluations"}
    monkeypatch.setattr(sys, "argv", [name, *(argument.format(run=run_copy) for argument in arguments)])
    with pytest.raises(SystemExit) as ended:
        COMMANDS[name].main()
    error = capsys.readouterr().err
    assert ended.value.code == BAD_INPUT
    assert message in error
    assert error.count("\n") == 1
    after = {path for path in run_copy.rglob("*") if "chunks" not in path.parts and path.name != "evaluations"}
    assert after == before


def test_a_sweep_over_samplers_and_the_closing_table(run_copy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["-m", f"run={run_copy}", "sampler.steps=2,3", "scores=fd", "num_samples=32"]
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])
    evaluate.main()
    said = capsys.readouterr().out
    assert "ddim2" in said
    assert "ddim3" in said
    assert len(list(run_copy.glob("evaluations/*/evaluation.json"))) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_stored_run_may_not_bring_code_along(run_copy, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate", f"run={run_copy}"])
    config = run_copy / "config.yaml"
    config.write_text(config.read_text().replace("qdm_lightning.quantization.quantizer.LSQWeight", "os.system"))
    with pytest.raises(SystemExit):
        evaluate.main()
    assert "would run os.system (quant.weight_quantizer._target_)" in capsys.readouterr().err


def test_a_run_with_a_quantizer_of_the_users_own_must_be_trusted(run_copy, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate", f"run={run_copy}"])
    config = run_copy / "config.yaml"
    config.write_text(config.read_text().replace("qdm_lightning.quantization.quantizer.LSQActivation", f"{__name__}.Own"))
    for file in run_copy.glob("checkpoints/*.ckpt"):
        checkpoint = load_checkpoint(file)
        checkpoint[KEY]["quant"]["act_quantizer"]["_target_"] = f"{__name__}.Own"
        torch.save(checkpoint, file)
    with pytest.raises(SystemExit):
        evaluate.main()
    said = capsys.readouterr().err
    trust = f"quant.act_quantizer._target_={__name__}.Own"
    assert f"type {trust}" in said
    assert evaluate(run_copy, [trust, "scores=fd"], Progress("silent")).record["scores"]["fd_digits"] > 0


def Own(**options):
    from qdm_lightning.quantization import LSQActivation

    return LSQActivation(**options)


@pytest.mark.parametrize("name", list(COMMANDS))
def test_help_waits_for_no_torch(name):
    code = f"import qdm_lightning.{name}, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    ended = subprocess.run(
        [sys.executable, "-m", f"qdm_lightning.{name}", "--cfg", "job"],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "error"},
    )
    assert "run: null" in ended.stdout
