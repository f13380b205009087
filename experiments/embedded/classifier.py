"""How `metrics/assets/digits.safetensors` was made: `python experiments/embedded/classifier.py [file]`, 10 s on one core.

Trains `DigitsClassifier` on the 1,500 training digits from a fixed seed on one thread, and writes nothing unless it gets at
least 97 % of the 297 held-out digits right. A quarter of every batch is noised, and its targets are as uncertain as the noise
is strong: the features of a plain classifier hardly notice noise, and a distance over them would not see bad pictures.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import qdm_lightning
from qdm_lightning.metrics.digits import WEIGHTS, DigitsClassifier

PACKAGE = Path(qdm_lightning.__file__).parent
STEPS = 1500
BATCH = 64
NOISED = 0.25
"""Share of a batch that gets Gaussian noise, its std uniform in [0, 1] (images in [-1, 1])."""


def load_digits(path: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Images (1797, 1, 8, 8) in [-1, 1], labels (1797,) and the mask (1797,) of those held out."""
    with np.load(path, allow_pickle=False) as archive:
        images, labels = torch.from_numpy(archive["images"]), torch.from_numpy(archive["labels"]).long()
        held_out = torch.from_numpy(np.isin(np.arange(len(images)), archive["held_out"]))
    return images[:, None].float() / 127.5 - 1.0, labels, held_out


def shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """`x`, or `x` moved by at most one pixel along each axis; black comes in at the edge."""
    draw = torch.randint(0, 6, (2,), generator=generator).clamp(max=3).tolist()
    row, column = (1 if d == 3 else d for d in draw)
    return F.pad(x, (1, 1, 1, 1), value=-1.0)[..., row : row + 8, column : column + 8]


def noised(x: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 8, 8), a quarter of them with noise sigma, and targets (N, 10), smoothed by 0.1 and by sigma."""
    sigma = torch.rand(len(x), generator=generator) * (torch.rand(len(x), generator=generator) < NOISED)
    noise = torch.randn(x.shape, generator=generator)
    images = ((x + sigma[:, None, None, None] * noise).clamp(-1, 1) * 127.5).round() / 127.5
    certainty = 0.9 * (1 - sigma)[:, None]
    return images, certainty * F.one_hot(labels, 10) + (1 - certainty) / 10


def train(x: Tensor, labels: Tensor, seed: int = 0) -> DigitsClassifier:
    """Fit a classifier: AdamW, one-cycle learning rate."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = DigitsClassifier()
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, STEPS)
    for _ in range(STEPS):
        index = torch.randint(len(x), (BATCH,), generator=generator)
        images, targets = noised(shifted(x[index], generator), labels[index], generator)
        loss = F.cross_entropy(network(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def main(path: Path) -> None:
    """Train, check, write."""
    torch.set_num_threads(1)
    x, labels, held_out = load_digits(PACKAGE / "data" / "assets" / "digits.npz")
    network = train(x[~held_out], labels[~held_out])
    with torch.no_grad():
        accuracy = (network(x[held_out]).argmax(1) == labels[held_out]).float().mean().item()
    if accuracy < 0.97:
        raise SystemExit(f"only {accuracy:.2%} of the held-out digits are right, 97 % are wanted: nothing is written")
    save_file(network.state_dict(), path)
    print(f"{path}: {accuracy:.2%} of the held-out digits, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else PACKAGE / "metrics" / "assets" / WEIGHTS)
