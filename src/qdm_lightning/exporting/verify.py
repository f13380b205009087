"""Whether an exported graph computes what the student does, as a runtime executes it.

A flipped code is amplified from layer to layer, so the end of a whole network proves nothing. Instead: the wiring in float,
where nothing is amplified; then each product from the very codes that entered it, each code from the very number it stands for.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from qdm_lightning.exporting.lowering import Activation, WeightCodes
from qdm_lightning.exporting.operators import Product, Translator
from qdm_lightning.quantization.timestep import timesteps
from qdm_lightning.runtimes.network import RuntimeNetwork

WIRING, PRODUCTS, CODES = 1e-4, 2e-6, 1e-4
"""What is allowed: of the greatest output, in float; of the greatest output of a product on codes; share of codes that differ
by one, where a number lies within float32's rounding of a tie."""


@dataclass
class Verified:
    """What a runtime showed.

    Attributes:
        runtime: name and version.
        int8, floating: products on integers and in float32, as the runtime reports them.
        wiring, products: greatest deviation over the greatest output.
        codes: share of codes that differ from the student's by one.
    """

    runtime: str
    int8: int
    floating: int
    wiring: float
    products: float
    codes: float

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def verify(translator: Translator, runtime: str, num_train_timesteps: int) -> Verified:
    """Compare the graph of `translator` with its network, in a runtime.

    Args:
        runtime: `onnxruntime` or `openvino`.

    Raises:
        RuntimeError: they do not agree; nothing should be written.
    """
    total = num_train_timesteps
    wiring = verify_wiring(translator, runtime, total)
    products, codes = verify_products(translator, runtime, total)
    network = RuntimeNetwork(translator.translate({}), runtime, torch.get_num_threads(), total)
    kernels = network.kernels()
    return Verified(network.provenance["runtime"], kernels["int8"], kernels["float"], wiring, products, codes)


def _inputs(translator: Translator, total: int) -> tuple[Tensor, Tensor]:
    """Four noises, at timesteps spread over the process."""
    return torch.randn(4, *translator.shape, generator=torch.Generator().manual_seed(0)), torch.linspace(0, total - 1, 4).long()


def verify_wiring(translator: Translator, runtime: str, total: int) -> float:
    """Greatest deviation of the graph without quantizers, over the greatest output. Raises RuntimeError above `WIRING`."""
    x, t = _inputs(translator, total)
    network = RuntimeNetwork(translator.translate({}, quantize=False), runtime, torch.get_num_threads(), total)
    with torch.no_grad():
        found = _relative(network(x, t), translator.network(x, t))
    if not found <= WIRING:
        raise RuntimeError(f"in {runtime} the graph without quantizers deviates by {found:.1e} of the greatest output")
    return found


def verify_products(translator: Translator, runtime: str, total: int) -> tuple[float, float]:
    """Greatest deviation of a product over its greatest output, and the share of codes that differ from the student's by one.

    Raises:
        RuntimeError: more than `PRODUCTS` and `CODES` allow, or a code that differs by more than one.
    """
    x, t = _inputs(translator, total)
    network = RuntimeNetwork(translator.translate({}, watch=True), runtime, torch.get_num_threads(), total)
    names = ["noise", *translator.watched()]
    values = dict(zip(names, map(torch.from_numpy, network.run(x.numpy(), t.numpy())), strict=True))
    deviations, differing, count = [0.0], 0, 0
    with torch.no_grad(), timesteps(t):
        for number, product in enumerate(translator.products):
            arguments = []
            for k, argument in enumerate(product.arguments):
                if isinstance(argument, Activation):
                    codes = values[f"codes{number}.{k}"]
                    seen = _codes(product, argument.quantizer, values[f"input{number}.{k}"], codes, runtime)
                    differing, count = differing + seen[0], count + seen[1]
                    arguments.append(codes)
                elif isinstance(argument, WeightCodes):
                    arguments.append(argument.quantizer(argument.weight))
                else:
                    arguments.append(values[f"input{number}.{k}"] if isinstance(argument, str) else argument)
            target: Any = product.node.target
            deviations.append(_relative(values[f"output{number}"], target(*arguments, **product.node.kwargs)))
            if product.integer and not deviations[-1] <= PRODUCTS:
                raise RuntimeError(f"{product.name} deviates by {deviations[-1]:.1e} of its greatest output in {runtime}")
    share = differing / max(count, 1)
    if not share <= CODES:
        raise RuntimeError(f"{share:.1e} of the codes differ from the student's in {runtime}")
    return max(deviations), share


def _codes(product: Product, quantizer: Any, x: Tensor, codes: Tensor, runtime: str) -> tuple[int, int]:
    """How many codes differ from the student's own, and how many there are. Raises RuntimeError where one differs by more."""
    scale = quantizer.grid(x)[0].view(-1, *[1] * (x.ndim - 1))
    steps = ((codes - quantizer.quantize(x)) / scale).abs()
    if not bool((steps < 1.5).all()):
        raise RuntimeError(f"a code of {product.name} differs by {steps.max():.1f} steps in {runtime}")
    return int((steps > 0.5).sum()), steps.numel()


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
