"""A search by Optuna over the settings of a run, each trial one `python -m qdm_lightning.train` of its own.

    python experiments/optuna_digits/search.py --trials 20

Trials lie in the study's folder, their values in its database: the same command with more trials goes on, and a trial that was
killed goes on from its checkpoint. Further words are overrides for every trial, such as `trainer.max_steps=300`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import optuna


def suggested(trial: optuna.Trial) -> list[str]:
    """The settings that are searched, as overrides: rewrite them for a search of your own."""
    return [
        f"optimizer.lr={trial.suggest_float('lr', 1e-4, 3e-3, log=True):.6g}",
        f"optimizer.quantizer_lr={trial.suggest_float('quantizer_lr', 1e-4, 1e-2, log=True):.6g}",
        f"taq={trial.suggest_categorical('taq', ['off', 'normalize'])}",
    ]


def objective(trial: optuna.Trial, folder: Path, measure: str, fixed: list[str]) -> float:
    """`measure` of the student that the trial trains."""
    run = folder / f"trial_{trial.number:04}"
    command = [sys.executable, "-m", "qdm_lightning.train", *fixed, *suggested(trial), f"hydra.run.dir={run}"]
    with (folder / f"trial_{trial.number:04}.log").open("a") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    return float(json.loads((run / "metrics.json").read_text())["student"][measure])


def main() -> None:
    """Search, and print the best settings."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=Path("outputs/optuna_digits"))
    parser.add_argument("--measure", default="image_mse", help="of metrics.json's student: image_mse, fd_digits, val_loss")
    parser.add_argument("fixed", nargs="*", help="overrides for every trial, such as trainer.max_steps=300")
    args = parser.parse_args()
    folder = args.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    storage = f"sqlite:///{folder / 'study.db'}"
    sampler = optuna.samplers.TPESampler(seed=0)
    study = optuna.create_study(study_name="search", storage=storage, sampler=sampler, load_if_exists=True)
    wanted = args.trials - len(study.get_trials(states=(optuna.trial.TrialState.COMPLETE,)))
    study.optimize(
        lambda trial: objective(trial, folder, args.measure, args.fixed),
        n_trials=max(0, wanted),
        catch=subprocess.CalledProcessError,
    )
    print(f"{args.measure} {study.best_value:.4g}: {' '.join(f'{k}={v}' for k, v in study.best_params.items())}")
    print(f"the run: {folder / f'trial_{study.best_trial.number:04}'}")


if __name__ == "__main__":
    main()
