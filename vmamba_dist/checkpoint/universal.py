"""DeepSpeed's universal checkpoint, in and out, without DeepSpeed.

Law: what is written loads into any ZeRO stage and world size with `checkpoint.load_universal`, and what DeepSpeed's
ds_to_universal makes of any stage is read. The folder, as of DeepSpeed 0.19.8:

    latest_universal                               the name of the folder below
    global_step7_universal/
      mp_rank_00_model_states.pt                   counters; the weights are not in it, since loading never looks
      zero_pp_rank_0_mp_rank_00_model_states.pt    the same, where stage 3 looks
      zero/optimizer_state.pt                      param_groups, and the step where stage 3 looks
      zero/<parameter>/fp32.pt, exp_avg.pt, exp_avg_sq.pt, step.pt
      vmamba.json, ema.safetensors                 ours beside it: what DeepSpeed has no place for

No hyper-parameters are written: DeepSpeed would load those of the first group into all (0.19.8), and what
a run's config says is what holds. ZeRO-3 leaves its parameters flat; their shapes are the model's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmamba_dist.checkpoint import store
from vmamba_dist.checkpoint.chunks import Chunk, whole
from vmamba_dist.checkpoint.formats import (
    BACKBONE,
    Source,
    load_plain,
    needs_model,
    open_safetensors_file,
    rebuilt,
    write_safetensors_file,
)
from vmamba_dist.checkpoint.store import Meta
from vmamba_dist.config.schema import ConfigError
from vmamba_dist.models.vmamba import create_model

LATEST = "latest_universal"
_ABOUT = "vmamba.json"
_EMA = "ema.safetensors"
_STATES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
_FILES = {"fp32": "model.{}", "exp_avg": "optim.{}.exp_avg", "exp_avg_sq": "optim.{}.exp_avg_sq"}
_VERSION = "0.19.8"  # of DeepSpeed, whose layout this is
_GROUPS = 64  # DeepSpeed loads as many parameter groups as there are here, and leaves the rest as they were
# What DeepSpeed pickles among plain values, and nobody here asks for.
_FOREIGN = (
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
)


def is_universal(path: Path) -> bool:
    return (path / LATEST).is_file() or (path / "zero").is_dir()


def open_universal(path: Path, model: str | None) -> tuple[Source, int, int]:
    """Open what ds_to_universal, or we, have written; also (steps, samples) as its counters say.

    Raises ConfigError naming what is missing.
    """
    folder = path / (path / LATEST).read_text().strip() if (path / LATEST).is_file() else path
    zero = folder / "zero"
    names = sorted(entry.name for entry in zero.iterdir() if (entry / "fp32.pt").is_file())
    if not names:
        raise ConfigError(f"{zero}: no parameter there, as zero/<name>/fp32.pt")
    meta = None
    if (folder / _ABOUT).is_file():
        meta = Meta(**json.loads((folder / _ABOUT).read_text(encoding="utf-8")))
    # Objectives hold a backbone; one that was trained alone has its bare names.
    prefix = "" if names[0].startswith(BACKBONE) else BACKBONE
    shapes = _shapes(meta, model, folder, {prefix + name: zero / name for name in names})
    wrong = sorted(set(shapes) ^ {prefix + name for name in names})
    if wrong:
        raise ConfigError(f"{zero}: not the model's parameters; they differ in {', '.join(wrong[:8])}")
    counters = _counters(folder)
    step = None if (zero / names[0] / "step.pt").is_file() else _common_step(zero, counters)

    index: dict[str, Chunk] = {}
    places: dict[str, Path | None] = {}
    for name, shape in shapes.items():
        at = zero / name.removeprefix(prefix)
        for file, pattern in _FILES.items():
            if not (at / f"{file}.pt").is_file():
                raise ConfigError(f"{at}: {file}.pt is missing")
            index[pattern.format(name)] = whole(pattern.format(name), shape, torch.float32)
            places[pattern.format(name)] = at / f"{file}.pt"
        index[f"optim.{name}.step"] = whole(f"optim.{name}.step", (), torch.float32)
        places[f"optim.{name}.step"] = None if step is not None else at / "step.pt"
    averages = open_safetensors_file(folder / _EMA) if (folder / _EMA).is_file() else None
    if averages is not None:
        index |= averages.index

    def read(name: str) -> Tensor:
        if averages is not None and name in averages.index:
            return averages.read(name)
        at = places[name]
        value = step if at is None else load_plain(at)
        value = value["param"] if isinstance(value, Mapping) else value
        tensor = torch.as_tensor(value, dtype=torch.float32)
        if tensor.numel() != math.prod(index[name].shape):
            raise ConfigError(f"{at}: {tensor.numel()} elements, but {name} is {index[name].shape}")
        return tensor.reshape(index[name].shape)

    samples = int(counters.get("global_samples") or 0)
    return Source(index, read, meta), int(counters.get("global_steps") or 0), samples


def write_universal(source: Source, meta: Meta, path: Path) -> None:
    """Write into an empty directory, one tensor at a time."""
    tag = f"global_step{meta.step}_universal"
    folder, zero = path / tag, path / tag / "zero"
    zero.mkdir(parents=True)
    names = [name.removeprefix("model.") for name in source.index if name.startswith("model.")]
    for name in names:
        (zero / name).mkdir()
        for file, pattern in _FILES.items():
            torch.save({"param": source.read(pattern.format(name)).clone()}, zero / name / f"{file}.pt")
        torch.save(source.read(f"optim.{name}.step").clone(), zero / name / "step.pt")
    groups: list[dict[str, Any]] = [{} for _ in range(_GROUPS)]
    step = source.read(f"optim.{names[0]}.step").clone()
    state = {
        "ds_version": _VERSION,
        "param_groups": groups,
        "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": groups},
    }
    torch.save(state, zero / "optimizer_state.pt")
    counters = {
        "module": {},
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [{name: torch.Size(source.index[f"model.{name}"].shape) for name in names}],
        "lr_scheduler": None,
        "skipped_steps": 0,
        "global_steps": meta.step,
        "global_samples": meta.samples,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_config": {},
        "ds_version": _VERSION,
        "universal_checkpoint_info": {"universal_checkpoint_version": 0.2},
    }
    for file in _STATES:
        torch.save(counters, folder / file)
    averages = {name: chunk for name, chunk in source.index.items() if name.startswith("ema.")}
    if averages:
        write_safetensors_file(folder / _EMA, averages, source.read, {"format": "pt"})
    (folder / _ABOUT).write_text(json.dumps(asdict(meta), indent=1), encoding="utf-8")
    (path / LATEST).write_text(tag)
    store.sync_tree(path)


def _shapes(
    meta: Meta | None, model: str | None, folder: Path, parameters: Mapping[str, Path]
) -> dict[str, tuple[int, ...]]:
    """Shapes by an objective's names, from the model that this is of."""
    if meta is not None:
        built = rebuilt(meta)
    elif model is not None:
        bias = parameters.get(f"{BACKBONE}classifier.head.bias")
        if bias is None:
            raise ConfigError(f"{folder}: no classifier.head.bias in it, so no VMamba classifier")
        value = load_plain(bias / "fp32.pt")
        classes = (value["param"] if isinstance(value, Mapping) else value).numel()
        with torch.device("meta"):
            built = create_model(model, num_classes=classes)
    else:
        raise needs_model(folder)
    return {BACKBONE + name: tuple(p.shape) for name, p in built.named_parameters()}


def _counters(folder: Path) -> Mapping[str, Any]:
    for file in _STATES:
        if (folder / file).is_file():
            counters: Mapping[str, Any] = load_plain(folder / file, mmap=True, stand_ins=_FOREIGN)
            return counters
    raise ConfigError(f"{folder}: neither {' nor '.join(_STATES)} is there, so no counters")


def _common_step(zero: Path, counters: Mapping[str, Any]) -> float:
    """The optimizer's step, where parameters do not tell their own, as ZeRO-3's."""
    file = zero / "optimizer_state.pt"
    if file.is_file():
        states = load_plain(file, mmap=True, stand_ins=_FOREIGN).get("optimizer_state_dict", {})
        for state in states.get("state", {}).values():
            if "step" in state:
                return float(state["step"])
    return float(counters["global_steps"] - counters.get("skipped_steps", 0))
