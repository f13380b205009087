"""`python -m qdm_lightning`: the commands and the experiments, a line each; `python -m qdm_lightning train ...` runs one."""

from __future__ import annotations

import os
import sys
from difflib import get_close_matches

from qdm_lightning.base.pipes import while_read
from qdm_lightning.cli.help import COMMANDS, overview


def main() -> int:
    """Without a word the overview; with the name of a command, that command with the words after it."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        with while_read():
            print(overview())
        return 0
    name = words[0]
    if name in COMMANDS:  # by its own name, which is what processes that it starts are started by
        flags = sys.orig_argv[1 : sys.orig_argv.index("-m")] if "-m" in sys.orig_argv else []
        os.execv(sys.executable, [sys.executable, *flags, "-m", f"qdm_lightning.{name}", *words[1:]])
    close = get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    listed = ", ".join(COMMANDS)
    print(f"error: {name} is not a command: {hint}there are {listed}; type python -m qdm_lightning train", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
