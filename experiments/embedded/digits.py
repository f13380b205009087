"""How `data/assets/digits.npz` was made: `python experiments/embedded/digits.py [file]`. Needs scikit-learn.

The 1,797 pictures of `sklearn.datasets.load_digits` (8x8, values 0..16, the test half of UCI's "Optical Recognition of
Handwritten Digits", CC BY 4.0) become uint8 as round(v * 255 / 16). 297 of them, drawn once by numpy's
`default_rng(0).permutation`, are held out; their indices are stored, so that no later numpy can move the split.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import numpy as np

import qdm_lightning

HELD_OUT = 297


def main(path: Path) -> None:
    """Write `images` (1797, 8, 8) uint8, `labels` (1797,) uint8 and `held_out` (297,) int16, ascending, to `path`."""
    digits = import_module("sklearn.datasets").load_digits()
    images = np.round(digits.images * 255 / 16).astype(np.uint8)
    held_out = np.sort(np.random.default_rng(0).permutation(len(images))[:HELD_OUT]).astype(np.int16)
    np.savez_compressed(path, images=images, labels=digits.target.astype(np.uint8), held_out=held_out)
    print(f"{path}: {images.shape}, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(qdm_lightning.__file__).parent / "data" / "assets" / "digits.npz")
