"""First scales and zero points from data: a pass that records each quantizer's input, and the searches over it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from qdm_lightning.base.checks import UserError, between
from qdm_lightning.quantization.layers import QuantizedLayer
from qdm_lightning.quantization.observer import Calibrator, ChannelSquares, Observer, Watcher
from qdm_lightning.quantization.quantizer import ActivationQuantizer


def _affine(low: Tensor, high: Tensor, qmin: int, qmax: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point whose grid covers [low, high] and holds zero; low and high of any one shape."""
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    if symmetric:
        bound = torch.maximum(high / qmax, low / qmin if qmin else torch.zeros_like(low))
        return bound.clamp(min=torch.finfo(torch.float32).tiny * 2**23), torch.zeros_like(bound)
    scale = ((high - low) / (qmax - qmin)).clamp(min=torch.finfo(torch.float32).tiny * 2**23)
    return scale, torch.round(qmin - low / scale).clamp(qmin, qmax)


class MinMax:
    """The grid covers the least and the greatest value."""

    def search(self, values: Tensor, qmin: int, qmax: int, *, symmetric: bool) -> tuple[Tensor, Tensor]:
        return _affine(*torch.aminmax(values, dim=1), qmin, qmax, symmetric)


class Percentile:
    """The grid covers the values between two percentiles, `100 - percentile` and `percentile`.

    Raises:
        ValueError: `percentile` outside [50, 100].
    """

    def __init__(self, percentile: float = 99.9) -> None:
        between("quant.calibrator.percentile", percentile, 50.0, 100.0)
        self.percentile = percentile

    def search(self, values: Tensor, qmin: int, qmax: int, *, symmetric: bool) -> tuple[Tensor, Tensor]:
        ordered = values.sort(dim=1).values  # torch.quantile refuses more than 2^24 values
        last = ordered.shape[1] - 1
        high = ordered[:, round(last * self.percentile / 100)]
        low = ordered[:, round(last * (1 - self.percentile / 100))]
        return _affine(low, high, qmin, qmax, symmetric)


AT_ONCE = 2**18
"""Values times ranges that a search looks at in one pass: they fit into a cache."""


class MSESearch:
    """The grid of least squared error ||x - x_hat||^2 among shrunken ranges [a low, b high], a and b in `steps` fractions.

    Symmetric grids try `3 * steps` fractions of the greatest magnitude; others every pair of a and b. A finer search around the
    best range follows. At most `max_values` values of a row count, a random subsample of more.
    """

    def __init__(self, steps: int = 16, max_values: int = 8192) -> None:
        self.steps = steps
        self.max_values = max_values

    @torch.no_grad()
    def search(self, values: Tensor, qmin: int, qmax: int, *, symmetric: bool) -> tuple[Tensor, Tensor]:
        low, high = torch.aminmax(values, dim=1)
        if values.shape[1] > self.max_values:
            pick = torch.randperm(values.shape[1], generator=torch.Generator().manual_seed(0))[: self.max_values]
            values = values[:, pick.to(values.device)]
        joint = symmetric or not bool((low < 0).any())
        coarse = torch.linspace(1.0, 0.04, 3 * self.steps) if joint else torch.logspace(0, -1.5, self.steps)
        best = [torch.full_like(low, torch.inf), low, high, *_affine(low, high, qmin, qmax, symmetric)]
        for fractions in (coarse, torch.linspace(0.88, 1.12, 9)):
            low, high = best[1:3]
            pairs = torch.stack([fractions] * 2, 1) if joint else torch.cartesian_prod(fractions, fractions)
            for ab in pairs.to(values.device).split(max(1, AT_ONCE // values.numel())):
                a_low, b_high = ab[:, :1] * low, ab[:, 1:] * high
                scale, zero = _affine(a_low, b_high, qmin, qmax, symmetric)
                s, z = scale[..., None], zero[..., None]
                codes = torch.clamp(torch.round(values / s) + z, qmin, qmax)
                error = ((codes - z) * s - values).square().mean(dim=2)
                least = error.min(dim=0, keepdim=True).indices
                tried = [found.gather(0, least)[0] for found in (error, a_low, b_high, scale, zero)]
                best = [torch.where(tried[0] < best[0], new, old) for new, old in zip(tried, best, strict=True)]
        return best[3], best[4]


def calibrate(model: nn.Module, run: Callable[[], object], calibrator: Calibrator | None = None, seed: int = 0) -> None:
    """Start every quantizer of a prepared `model` from data.

    Args:
        model: prepared by `prepare`.
        run: passes the calibration batches through the model, under `timesteps(t)` where it does not tell its own.
            Quantizers are off meanwhile, so that all see the full-precision activations. Called once more, before, where layers
            have scales by input channel.
        calibrator: the search; `MSESearch()` where None.
        seed: seed of the random subsample that is kept of each activation.

    Raises:
        RuntimeError: a quantizer saw no input, so that it could not be started.
        UserError: an input, a weight or a scale is NaN or infinite.
    """
    calibrator = calibrator or MSESearch()
    quantizers = {name: m for name, m in model.named_modules() if isinstance(m, ActivationQuantizer)}
    observers = {name: Observer(torch.Generator().manual_seed(seed)) for name in quantizers}
    set_channel_scales(model, run)
    observe(model, observers, run)
    silent = [name for name, observer in observers.items() if not observer.parts]
    if silent:
        raise RuntimeError(f"calibration reached no input of {', '.join(silent)}: run the whole model in calibration")
    for name, quantizer in quantizers.items():
        _check_finite(f"the input of {name}", observers[name].ends, observers[name].timesteps)
        quantizer.initialize(observers[name], calibrator)
        _check_finite(f"the grid of {name}", *quantizer.state_dict().values())
    for layer_name, layer in ((name, m) for name, m in model.named_modules() if isinstance(m, QuantizedLayer)):
        _check_finite(f"the weight of {layer_name}", layer.weight.detach())
        if layer.weight_quantizer is not None:
            layer.weight_quantizer.initialize(layer.scaled_weight(), calibrator)
            _check_finite(f"the grid of {layer_name}.weight_quantizer", *layer.weight_quantizer.state_dict().values())


def observe(model: nn.Module, observers: Mapping[str, Watcher], run: Callable[[], object]) -> None:
    """Call `run` with all quantizers of a prepared `model` off, each activation's with the observer of its name."""
    quantizers = {name: m for name, m in model.named_modules() if isinstance(m, ActivationQuantizer)}
    layers = [m for m in model.modules() if isinstance(m, QuantizedLayer)]
    try:
        for name, quantizer in quantizers.items():
            quantizer.observer = observers[name]
        for layer in layers:
            layer.calibrating = True
        with torch.no_grad():
            run()
    finally:
        for quantizer in quantizers.values():
            quantizer.observer = None
        for layer in layers:
            layer.calibrating = False


LEAST_CHANNEL = 1e-3
"""A channel's root mean square counts as no less than this share of the layer's: a silent one may speak later."""


def set_channel_scales(model: nn.Module, run: Callable[[], object]) -> None:
    """r_c = rms_c^0.5 over its geometric mean, of the input of each layer that has scales by channel; `run` as for `calibrate`.

    Without such layers `run` is not called.
    """
    quantizers = {name: m for name, m in model.named_modules() if isinstance(m, ActivationQuantizer)}
    layers = {
        id(m.input_quantizer): m for m in model.modules() if isinstance(m, QuantizedLayer) and m.log_channel_scale is not None
    }
    if not layers:
        return
    for layer in layers.values():
        layer.log_channel_scale.detach().zero_()  # type: ignore[union-attr]
    observers = {
        name: ChannelSquares(layers[id(q)].channel_axis if id(q) in layers else None) for name, q in quantizers.items()
    }
    observe(model, observers, run)
    for name, quantizer in quantizers.items():
        if id(quantizer) in layers and observers[name].total is not None:
            rms = observers[name].root_mean_square()
            _check_finite(f"the input of {name}", rms)
            rms = rms.clamp(min=LEAST_CHANNEL * float(rms.square().mean().sqrt())).clamp(min=torch.finfo(torch.float32).tiny)
            logarithm = (rms.log() - rms.log().mean()).mul(0.5)
            layers[id(quantizer)].log_channel_scale.detach().copy_(logarithm)  # type: ignore[union-attr]


def _check_finite(what: str, values: Tensor | None = None, *more: Tensor) -> None:
    """Raise UserError where one of `values` is NaN or infinite; the timesteps of its rows may stand in `more`."""
    if values is None or bool(torch.stack([v.isfinite().all() for v in (values, *more)]).all()):
        return
    rows = ~values.isfinite().reshape(len(values), -1).all(1)
    times = f" at timestep {int(more[0][rows][0])}" if more and more[0].shape == rows.shape and rows.any() else ""
    raise UserError(f"calibration: {what} is not finite{times}: the network that is quantized is damaged or has diverged")
