"""The model card of a student: README.md of its folder on the hub, made of the run's own records alone."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from qdm_lightning import __version__
from qdm_lightning.base.checks import visible
from qdm_lightning.base.files import read_json
from qdm_lightning.diffusion.spec import SamplerConfig
from qdm_lightning.reporting.collect import Result, Run
from qdm_lightning.reporting.labels import VARIANTS, labels
from qdm_lightning.reporting.records import METRICS
from qdm_lightning.reporting.tables import FORMULAS, markdown_table

TASK, CONDITIONAL = "unconditional-image-generation", "class-conditional-image-generation"
CODE = "qdm_lightning"
TEACHERS = {"auto": "trained by the run", "checkpoint": "a checkpoint", "pretrained": "a diffusers folder"}
"""Where a teacher comes from, by what a record calls it."""

CONVENTIONS = {
    "linear": "MACs · b/32, b the wider operand",
    "bops": "bit operations, full precision as 32 · 32",
    "bops64": "bit operations / 64 + what stays float",
}
LICENSES = {"digits": "The digits are the UCI set of Alpaydin and Kaynak, CC BY 4.0."}
"""What is known of the data that come with the package."""


@dataclass(frozen=True, kw_only=True)
class Publication:
    """What a card says that no record holds.

    Attributes:
        name: of the model, its heading.
        repo: on the hub; None for a folder alone.
        command: what trains the run, for a shell; places are placeholders.
        license: identifier of the hub's; None where the user chose none.
    """

    name: str
    repo: str | None
    command: str
    license: str | None = None


def model_card(run: Run, results: Sequence[Result], about: Publication) -> str:
    """The card as Markdown with YAML front matter.

    Args:
        run: a finished run with a student.
        results: what was measured of its student, see `reporting.collect`.
        about: what no record holds.
    """
    bits, method, _ = labels([run])[run.folder]
    data = _short(run.settings.get("data._target_"), "Data")
    front = yaml.safe_dump(_front_matter(run, results, about, bits, data), sort_keys=False, allow_unicode=True)
    grid = "![teacher above, student below, same seeds](samples.png)\n\n" if (run.folder / "samples.png").is_file() else ""
    trial = "**A trial: it was trained for a few steps, and its numbers mean nothing.**\n\n" if run.metrics.get("trial") else ""
    parts = [
        f"---\n{front}---\n\n# {visible(about.name)}\n\n{trial}{_method(run, bits, method, data)}\n\n{grid}",
        f"## Use\n\n{_usage(run, about.repo)}\n\n",
        f"## Scores\n\n{_scores(results)}\n\n",
        f"## Cost of one denoising step of one image\n\n{_cost(run)}\n\n## Measured speed\n\n{_speed(results)}\n\n",
        f"## Training\n\n```bash\n{_wrapped(about.command)}\n```\n\n{_training(run)}\n\n",
        f"## Limits\n\n{_limits(run)}\n\n## Licence\n\n{_license(about.license, data)}\n",
    ]
    return "".join(parts)


def _front_matter(run: Run, results: Sequence[Result], about: Publication, bits: str, data: str) -> dict[str, Any]:
    conditional = _conditional(run)
    task, named = (CONDITIONAL, "Class-conditional") if conditional else (TASK, "Unconditional")
    scores = [
        {"type": name, "value": round(value, 6), "name": f"{name} ({_how(result)})"}
        for result in results
        for name, value in result.scores.items()
    ]
    kind = {"type": task, "name": f"{named} image generation"}
    entry = {"name": about.name, "results": [{"task": kind, "dataset": {"type": data, "name": data}, "metrics": scores}]}
    return {
        "library_name": "diffusers",
        **({} if conditional else {"pipeline_tag": TASK}),  # the hub has none for classes
        **({"license": about.license} if about.license else {}),
        "tags": ["diffusion", task, "quantization", "q-dm", CODE, bits],
        **({"model-index": [entry]} if scores else {}),
    }


def _method(run: Run, bits: str, method: str, data: str) -> str:
    s = run.settings
    widths = f"weights of {s['quant.weight_bits']} bits and activations of {s['quant.act_bits']}"
    ends = f"first and last layer {s.get('quant.first_last_bits', 8)}"
    qkv = s.get("quant.qkv_bits") or s["quant.act_bits"]
    attention = f"q, k, v {qkv}, attention probabilities {s.get('quant.probs_bits')}"
    size = int(s.get("model.sample_size") or 0)
    what = f"{size}x{size} images" if size else "images"
    how = "post-training quantization" if s.get("quant.mode") == "ptq" else "quantization-aware training"
    return (
        f"A quantized diffusion model ({bits.upper()}, {method}) of {what}, data `{data}`: {widths} ({ends}; {attention}). "
        f"It was made by {how} with {CODE}, an implementation of Q-DM "
        '("Q-DM: An Efficient Low-bit Quantized Diffusion Model", Li et al., NeurIPS 2023), from a full-precision teacher.'
    )


def _usage(run: Run, repo: str | None) -> str:
    s = run.settings
    place = json.dumps("THIS_FOLDER" if repo is None else repo)
    first = "" if repo is None else "from huggingface_hub import snapshot_download\n\n"
    folder = place if repo is None else f"snapshot_download({place})"
    total = s.get("diffusion.num_train_timesteps")
    estimate = "v" if s.get("diffusion.prediction_type") == "v_prediction" else "the noise"
    conditional = _conditional(run)
    label = ", class_labels=0" if conditional else ""
    pipeline = (  # pipelines give it no class
        "```python\nimport qdm_lightning  # diffusers knows its quantization then\nfrom diffusers import DDPMPipeline\n\n"
        f"pipeline = DDPMPipeline.from_pretrained({place})\n"
        f"images = pipeline(batch_size=16).images  # by DDPM, in {total} steps\n```\n\nor, with"
    )
    return (
        f"With `qdm_lightning` {__version__.rpartition('.')[0]} or later installed (`pip install .` in its sources):\n\n"
        f"{'With' if conditional else pipeline} the sampler that the scores are of, image i by its seed alone:\n\n"
        f"```python\n{first}import qdm_lightning\n\n"
        f"student = qdm_lightning.load_student({folder})\n"
        f"sampler = {_sampler(run)}\n"
        f"images = qdm_lightning.draw_images(student, range(16), sampler{label})  # in [-1, 1]\n```\n\n"
        f"`student` is a `UNet2DModel` that estimates {estimate}; its schedule is in `scheduler/`. Its forward quantizes as in "
        'training. `load_student(..., execution="integer")` runs it on integer codes, on a CPU.'
    )


def _sampler(run: Run) -> str:
    """The run's `SamplerConfig` as code, but for the batch."""
    nested, usual = "scheduler.", asdict(SamplerConfig(batch_size=16))
    given = {name.removeprefix("sampler."): value for name, value in run.settings.items() if name.startswith("sampler.")}
    scheduler = {name.removeprefix(nested): value for name, value in given.items() if name.startswith(nested)}
    own = {**usual, **given, "batch_size": 16, "scheduler": scheduler}
    said = [name for name, value in usual.items() if name in ("kind", "steps", "batch_size") or own[name] != value]
    return f"qdm_lightning.SamplerConfig({', '.join(f'{name}={own[name]!r}' for name in said)})"


def _scores(results: Sequence[Result]) -> str:
    rows = []
    for result in results:
        for name, value in result.scores.items():
            bound = result.equals.get(name)
            rows.append(
                [
                    name,
                    _with_interval(value, name, result.record),
                    _number(result.teacher.get(name)),
                    _number(bound),
                    _how(result),
                ]
            )
    if not rows:
        return "Nothing was measured."
    notes = [f"* {name}: {FORMULAS[name]}" for name in ("image_mse", "nem_error") if any(row[0] == name for row in rows)]
    notes.append(
        "* A Frechet distance is called FID over Inception's published weights alone; others carry their network's name."
    )
    if any(result.equals for result in results):
        notes.append("* As many real images: what a perfect generator would score with these numbers of images.")
    if not any("±" in row[1] for row in rows):
        notes.append("* One training and one set of images: there is no interval. Distances of few images scatter.")
    head = ["score", "student", "teacher", "as many real images", "protocol"]
    return "\n".join([*markdown_table(head, rows), "", *notes])


def _how(result: Result) -> str:
    p = result.protocol
    sampler = f"{p.get('sampler.kind')}-{p.get('sampler.steps')}"
    return f"{p.get('num_samples')} images, {sampler}, {p['measured']}, {_execution(p)}"


def _execution(protocol: Mapping[str, Any]) -> str:
    return f"{protocol.get('execution', 'simulated')} execution"


def _with_interval(value: float, name: str, record: Mapping[str, Any]) -> str:
    repeated = (record.get("repeats") or {}).get("scores", {}).get(name)
    if not repeated:
        return _number(value)
    return f"{value:.4g} ± {repeated['half_width']:.2g} (95 %, {repeated['n']} sets of images)"


def _cost(run: Run) -> str:
    cost = run.student.get("cost") or {}
    rows = [
        ["multiply-accumulates", f"{cost.get('macs', 0):,}"],
        ["parameters", f"{cost.get('parameters', 0):,}"],
        ["bytes of the weights at their bits", f"{cost.get('bytes', 0):,} ({cost.get('float_bytes', 0):,} in float32)"],
        *(
            [f"speed-up in theory, {name}: {CONVENTIONS.get(name, name)}", f"{factor:.2f}"]
            for name, factor in (cost.get("speedup") or {}).items()
        ),
    ]
    theory = "Theory by convention: norms, activations and memory traffic are not counted."
    return "\n".join([*markdown_table(["quantity", "value"], rows), "", theory])


def _speed(results: Sequence[Result]) -> str:
    lines = []
    for result in results:
        seconds, images = (result.record.get("seconds") or {}).get("sampling"), (result.record.get("images") or {}).get("count")
        if result.source == METRICS or not seconds or not images:
            continue
        machine = next(iter(result.record.get("drawn_on") or [{}]))
        where = f"{machine.get('processor', 'unknown processor')}, {machine.get('threads', '?')} threads"
        steps = f"{result.protocol.get('sampler.kind')} with {result.protocol.get('sampler.steps')} steps"
        lines.append(f"* {images} images, {steps}, {_execution(result.protocol)}: {float(seconds):.4g} s on {where}")
    return "\n".join(lines) or (
        "Not measured. Simulated quantization computes in float and is not faster than full precision; integer execution is "
        '`load_student(..., execution="integer")`, or an ONNX or OpenVINO file by `python -m qdm_lightning.export`.'
    )


def _wrapped(command: str, columns: int = 100) -> str:
    """A shell's command over as many lines as it needs."""
    lines = [""]
    for word in map(shlex.quote, shlex.split(command)):
        if lines[-1] and len(lines[-1]) + len(word) >= columns:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return " \\\n    ".join(lines)


def _training(run: Run) -> str:
    s, m = run.settings, run.metrics
    versions, machine = m.get("versions") or {}, m.get("hardware") or {}
    origin, threads, channels = m.get("teacher_origin") or {}, machine.get("threads"), s.get("quant.channel_scales")
    facts = {
        "seed": m["seed"],
        "steps": run.student.get("steps"),
        "teacher": "the one that comes with the package" if origin.get("shipped") else TEACHERS.get(str(origin.get("source"))),
        "TaQ": _taq(run),
        "NeM": _nem(run),
        "scales by input channel": channels if channels != "off" else None,
        "versions": ", ".join(
            f"{name} {versions[name]}" for name in ("qdm-lightning", "torch", "diffusers") if name in versions
        ),
        "processor": f"{machine.get('gpu') or machine.get('processor')}, {threads} {'thread' if threads == 1 else 'threads'}",
        "time": f"{run.seconds:.0f} s, measuring included",
        "warnings": "; ".join(map(str, m.get("warnings") or [])),
    }
    return "\n".join(f"* {name}: {visible(value)}" for name, value in facts.items() if value not in (None, ""))


def _taq(run: Run) -> str:
    """`off`, or the variant and where it acts."""
    variant = VARIANTS["TaQ"](run)
    return f"{variant} on {run.settings.get('taq.scope')}" if variant else "off"


def _nem(run: Run) -> str:
    """`off`, or the mode, and how L_NeM is weighted over t where that is not alike."""
    mode = VARIANTS["NeM"](run)
    weighting = str(run.settings.get("nem.weighting._target_") or "").rpartition(".")[2]
    if not mode or weighting in ("", "Uniform"):
        return mode or "off"
    given = {name.rpartition(".")[2]: v for name, v in run.settings.items() if name.startswith("nem.weighting.")}
    numbers = ", ".join(f"{name} {value}" for name, value in given.items() if isinstance(value, int | float))
    return f"{mode}, weighted over t by {weighting}" + (f" ({numbers})" if numbers else "")


def _limits(run: Run) -> str:
    kind = "class-conditional: scores are over all classes in equal parts" if _conditional(run) else "unconditional"
    return (
        f"* It generates what its data are like, and inherits their biases; it is {kind}.\n"
        "* The student imitates its teacher: `image_mse` says how far from the teacher's images its own are.\n"
        f"* The scores hold for the sampler, the number of images and the seed above (run seed {run.seed}), not for others.\n"
        "* Image i depends on its seed alone, on one machine with the same versions and threads; elsewhere last bits differ."
    )


def _conditional(run: Run) -> bool:
    """Whether the student takes class labels, by its own config.json."""
    file = run.folder / "student" / "unet" / "config.json"
    return file.is_file() and read_json(file).get("num_class_embeds") is not None


def _license(chosen: str | None, data: str) -> str:
    weights = f"The weights: {chosen}." if chosen else "No licence was chosen for the weights."
    known = LICENSES.get(
        data, "Weights that were trained on images may be bound by the licence of those images and of the teacher."
    )
    return f"{weights} {known} The code that loads them is Apache-2.0."


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" if math.isfinite(value) else str(value)


def _short(target: Any, suffix: str) -> str:
    """`digits` of `qdm_lightning.data.digits.DigitsData`."""
    return str(target or "unknown").rpartition(".")[2].removesuffix(suffix).lower()
