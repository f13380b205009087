"""Standard output that may be closed by whoever reads it, such as `head`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

BROKEN_PIPE = 141
"""Exit status, as shells have it."""


@contextmanager
def while_read() -> Iterator[None]:
    """End quietly when the reader of stdout has seen enough. Raises SystemExit then."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in the buffer goes nowhere
        raise SystemExit(BROKEN_PIPE) from None
