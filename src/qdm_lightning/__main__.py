"""`python -m qdm_lightning`: the commands and the experiments, a line each."""

from qdm_lightning.cli.help import overview

if __name__ == "__main__":
    print(overview())
