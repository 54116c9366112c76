"""`vmamba study predict`: what the law says of a run that nobody has made, and how far out that is.

Law: a prediction outside of the fitted sizes or samples says so and by how much.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vmamba_dist.config import Config, ConfigError, load
from vmamba_dist.config.schema import ModelConfig
from vmamba_dist.models import flops
from vmamba_dist.models.variants import configured, describe
from vmamba_dist.scaling.analysis import law_of
from vmamba_dist.scaling.fitted import DETAILS, positive, split, study_folder, whole
from vmamba_dist.scaling.study import classes_of, gpu_hours_per_sample, hours_told

# Words of the verb, and what each stands for.
WORDS = {
    "model": "its name",
    "samples": "samples seen",
    "fit": "details of a fit, as `vmamba study fit details=FILE` writes them (a study's own, beside its runs)",
    "gpu": "kind of GPU, for GPU-hours (study.gpu)",
    "gpus": "of them (study.gpus)",
    "width": "first width, where it is not the named model's",
    "image_size": "px (the study's)",
    "batch": "samples an update (the study's)",
}


@dataclass(frozen=True)
class Prediction:
    """The expected loss of a run, and what it would take."""

    params: int
    samples: float
    loss: float
    law: tuple[float, float]  # bounds of the law there
    run: tuple[float, float]  # bounds of one run there: its noise too
    beyond: tuple[str, ...]  # how it lies outside of the fitted range; empty: inside
    flops: float
    gpu_hours: float | None
    no_cost: str  # why there are no GPU-hours; "" where there are


def main(words: Sequence[str]) -> int:
    """Print a prediction."""
    own, rest = split(words, WORDS)
    for word in ("model", "samples"):
        if word not in own:
            raise ConfigError(f"{word} is not set: {word}=… is {WORDS[word]}")
    samples = positive("samples", own["samples"])
    cfg, path = _study(own, rest)
    kept = _details(path)
    # As a study's rungs are: model.* of its config holds for whatever model is named, all but model.name.
    model = replace(cfg.model, name=own["model"])
    if "width" in own:
        model = replace(model, width=whole("width", own["width"]))
    cfg = replace(cfg, model=model)
    if "image_size" in own:
        cfg = replace(cfg, data=replace(cfg.data, image_size=whole("image_size", own["image_size"])))
    batch = whole("batch", own.get("batch", str(cfg.data.global_batch)))
    gpu = own.get("gpu", cfg.study.gpu)
    gpus = whole("gpus", own["gpus"]) if "gpus" in own else cfg.study.gpus
    found = predict_run(kept, cfg, samples, batch=batch, gpu=gpu, gpus=gpus)
    print("\n".join(text(found, cfg.model, cfg, gpu, gpus, kept)))
    return 0


def predict_run(
    kept: Mapping[str, Any], cfg: Config, samples: float, *, batch: int, gpu: str, gpus: int
) -> Prediction:
    """Predict a run of the config's model; `kept` are a fit's details. Raises ConfigError where they are not."""
    law = law_of(kept)
    variant, side, classes = configured(cfg.model), cfg.data.image_size, classes_of(cfg)
    params = flops.params(variant, 0)
    at = np.array([[float(params)], [samples]])
    value, low, high = law.loss(at)
    run_low, run_high = law.new_run(at)
    hours, why = _cost(cfg, batch, gpu, gpus, classes)
    return Prediction(
        params,
        samples,
        float(value[0]),
        (float(low[0]), float(high[0])),
        (float(run_low[0]), float(run_high[0])),
        tuple(_beyond(kept, params, samples, side)),
        float(flops.train_flops_per_image(variant, side, side, classes)) * samples,
        None if hours is None else hours * samples,
        why,
    )


def _cost(cfg: Config, batch: int, gpu: str, gpus: int, classes: int) -> tuple[float | None, str]:
    """GPU-hours a sample in bfloat16, or why there are none: a loss can be predicted where a cost cannot."""
    if not gpu:
        return None, "name a kind of GPU with gpu=…"
    cfg = replace(cfg, precision=replace(cfg.precision, compute="bfloat16"))
    try:
        return gpu_hours_per_sample(cfg, batch, gpu, gpus, classes), ""
    except ConfigError as error:
        return None, str(error)


def _beyond(kept: Mapping[str, Any], params: float, samples: float, side: int) -> Iterator[str]:
    for name, value in (("params", params), ("samples", samples)):
        low, high = kept["range"][name]
        if value > high:
            yield f"{value / high:.3g} × the most {name} that were fitted, {high:.4g}"
        elif value < low:
            yield f"{low / value:.3g} × less than the fewest {name} that were fitted, {low:.4g}"
    seen = kept.get("resolutions", ())
    if seen and side not in seen:
        yield f"images of {side} px, where those of the runs had {' or '.join(f'{px:g}' for px in seen)}"


def text(
    found: Prediction, model: ModelConfig, cfg: Config, gpu: str, gpus: int, kept: Mapping[str, Any]
) -> list[str]:
    """Return a prediction for people, as lines."""
    low, high = found.law
    run_low, run_high = found.run
    rejected = kept.get("rejected")
    lines = [f"REJECTED: {rejected}", ""] if rejected else []
    lines += [
        f"model    {describe(model)}, {found.params / 1e6:.2f} M parameters without the classifier",
        f"samples  {found.samples:.4g} at {cfg.data.image_size} px: C = {found.flops:.3g} training FLOPs",
        f"loss     {found.loss:.4f}; 95 % of the law {low:.4f} … {high:.4f}, of one run {run_low:.4f} … {run_high:.4f}",
    ]
    if found.gpu_hours is not None:
        hours = f"{hours_told(found.gpu_hours)} GPU-hours on {gpus} × {gpu}"
        lines.append(f"cost     {hours} in bfloat16, by `vmamba plan`'s model")
    else:
        lines.append(f"cost     unknown: {found.no_cost}")
    if found.beyond:
        lines += [f"OUTSIDE of the fitted range: {how}" for how in found.beyond]
    else:
        lines.append("inside of the fitted range")
    lines += [f"note     {remark}" for remark in kept.get("remarks", ()) if remark != rejected]
    return lines


def _study(own: Mapping[str, str], rest: Sequence[str]) -> tuple[Config, Path]:
    cfg = load(rest)
    if "fit" in own:
        return cfg, Path(own["fit"])
    if not any(word.startswith("config=") for word in rest):
        raise ConfigError("name the law: config=STUDY for a study's, or fit=DETAILS.json")
    return cfg, study_folder(cfg) / DETAILS


def _details(path: Path) -> dict[str, Any]:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"fit={path}: no such file; `vmamba study fit … details={path}` writes it"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"fit={path}: cannot be read ({error})") from error
    if not isinstance(kept, dict):
        raise ConfigError(f"fit={path}: these are no details of a fit; write them with details=FILE")
    return kept
