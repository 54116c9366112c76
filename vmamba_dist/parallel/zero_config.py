"""What DeepSpeed is told, and how a user's own file joins in.

Law: everything that decides the numbers follows from the run's config; a file of the user's tunes what is left
(buckets, prefetch, logging) and is refused where it would say something else. No DeepSpeed in this file: it is loaded
only where parallel.engine asks for it.
"""

from __future__ import annotations

import difflib
import importlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType, NoneType
from typing import Any

import torch

from vmamba_dist.config.schema import ConfigError, ParallelConfig

DEFAULT_STAGE = 2
_BUCKET = 25_000_000  # elements reduced or gathered at once: 100 MB, and as much again where they overlap

# Keys that we set, and what gives their values.
_OURS = {
    "train_micro_batch_size_per_gpu": "data.global_batch and parallel.micro_batch",
    "gradient_accumulation_steps": "data.global_batch and parallel.micro_batch",
    "gradient_clipping": "optim.clip",
    "torch_autocast.enabled": "precision.compute",
    "torch_autocast.dtype": "precision.compute",
    "zero_optimization.stage": "parallel.zero_stage",
    "zero_optimization.offload_optimizer.device": "parallel.cpu_offload",
    "zero_optimization.offload_param.device": "parallel.cpu_offload",
    "zero_optimization.stage3_param_persistence_threshold": "the average of the weights, which needs every one split",
    "zero_optimization.stage3_max_reuse_distance": "the average of the weights, which needs every one split",
    "zero_optimization.memory_efficient_linear": "this project, since it would replace torch's linear for all",
    "zero_allow_untested_optimizer": "this project: the optimizer is torch's AdamW",
    "zero_force_ds_cpu_optimizer": "this project: the optimizer is torch's AdamW",
}
# Keys that would take over what the run's config decides, or that ask for what is not offered here.
_REFUSED = {
    "train_batch_size": "data.global_batch",
    "optimizer": "optim.*",
    "scheduler": "schedule.*",
    "fp16": "precision.compute",
    "bf16": "precision.compute",
    "amp": "precision.compute",
    "data_types": "precision.compute",
    "activation_checkpointing": "parallel.recompute",
    "compile": "parallel.compile",
    "checkpoint": "checkpoint.*",
    "data_efficiency": "data.*",
    "curriculum_learning": "data.*",
    "managed_gradient_accumulation": "",
    "gradient_allreduce_op": "",
    "weight_quantization": "",
    "hybrid_engine": "",
    "tensor_parallel": "",
    "pipeline": "",
    "expert_parallel": "",
    "sequence_parallel_size": "",
    "data_parallel_size": "",
    "autotuning": "",
    "zero_optimization.cpu_offload": "parallel.cpu_offload",
    "zero_optimization.cpu_offload_param": "parallel.cpu_offload",
    "zero_optimization.param_persistence_threshold": "zero_optimization.stage3_param_persistence_threshold",
    "zero_optimization.max_reuse_distance": "zero_optimization.stage3_max_reuse_distance",
    "zero_optimization.compute_grad_norm": "",
    "zero_optimization.zenflow": "",
    "zero_optimization.zero_hpz_partition_size": "",
    "zero_optimization.zero_quantized_weights": "",
    "zero_optimization.zero_quantized_nontrainable_weights": "",
    "zero_optimization.zero_quantized_gradients": "",
    "zero_optimization.offload_optimizer.super_offload": "",
    "zero_optimization.offload_optimizer.ratio": "",
}
# Groups and keys of DeepSpeed's that a file may set freely. It passes over a key that it does not know, so we look.
_FREE = {
    "aio",
    "comet",
    "comms_logger",
    "communication_data_type",
    "csv_monitor",
    "disable_allgather",
    "disable_python_gc",
    "dump_state",
    "flops_profiler",
    "gradient_predivide_factor",
    "log_level",
    "memory_breakdown",
    "prescale_gradients",
    "steps_per_print",
    "tensorboard",
    "timers",
    "torch_autocast",
    "wall_clock_breakdown",
    "wandb",
    "zero_optimization",
}
_OFF = (None, False, "auto")


def build_config(
    parallel: ParallelConfig,
    *,
    clip: float,
    compute: torch.dtype,
    device: torch.device,
    ranks: int,
    largest: int,
    total: int,
) -> dict[str, Any]:
    """DeepSpeed's config for a model of `total` elements on so many ranks, the largest parameter having `largest`.

    Raises ConfigError naming what parallel.deepspeed_config says otherwise, or what ZeRO-3 cannot do.
    """
    stage = parallel.zero_stage or DEFAULT_STAGE
    if stage == 3 and parallel.compile == "block":
        # Tried: dynamo gives up on DeepSpeed's hooks, block by block and with much noise, and all of it runs eagerly.
        raise ConfigError(
            "parallel.compile='block': parallel.zero_stage=3 gathers weights by hooks inside the blocks, which cannot "
            "be compiled; use parallel.compile=off, parallel.zero_stage=2, or parallel.engine=fsdp"
        )
    # A parameter that outgrows the bucket would take a path of its own; small models need no 100 MB.
    bucket = 2 * ((max(largest, min(_BUCKET, total)) + 1) // 2)
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": device.type == "cuda",
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if stage < 3 and ranks == 1:
        # Nothing is exchanged: to overlap it DeepSpeed would wait for the device at each backward's end.
        zero["overlap_comm"] = False
    if stage == 3:
        zero |= {
            # What DeepSpeed keeps whole between uses is a copy: who writes the parts, as the average's swap does,
            # would not reach it.
            "stage3_param_persistence_threshold": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": _BUCKET,
            "memory_efficient_linear": False,
        }
    if parallel.cpu_offload:
        pinned = {"device": "cpu", "pin_memory": device.type == "cuda"}
        zero |= {"offload_optimizer": pinned} | ({"offload_param": dict(pinned)} if stage == 3 else {})
    config: dict[str, Any] = {
        # The loop counts the samples and divides the loss: to DeepSpeed, every micro-batch is a batch of one.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "timers": {"throughput": {"enabled": False}},  # it would sync the device every step
        "torch_autocast": {
            "enabled": compute == torch.bfloat16,
            "dtype": "bfloat16",
            # Of the classes named here DeepSpeed would gather weights and sum gradients in bfloat16.
            "lower_precision_safe_modules": [],
        },
    }
    if parallel.deepspeed_config:
        _merge(config, _read(Path(parallel.deepspeed_config)), parallel.deepspeed_config)
    if clips_on_device(config):
        config["gradient_clipping"] = 0.0
        zero["compute_grad_norm"] = False
        if ranks == 1:
            zero["stage"] = 1  # alone a process has every part: ZeRO-2 holds no less, and would reduce
            if not zero["overlap_comm"]:
                # Then DeepSpeed hangs no hook on a gradient, and our engine leaves its reduction out. Where it reduces,
                # this stays on: without, it fails at a bucket that holds a depthwise weight's gradient alone.
                zero.setdefault("contiguous_gradients", False)
    return config


def clips_on_device(config: Mapping[str, Any]) -> bool:
    """Whether our engine measures and clips gradients: DeepSpeed's step would wait for the device several times.

    DeepSpeed lets go of it under ZeRO-1 and 2, and where the host does not have the gradients anyway.
    """
    offload = _at(config, "zero_optimization.offload_optimizer.device")
    return config["zero_optimization"]["stage"] < 3 and offload in (None, "none")


def load_engine(device: torch.device) -> ModuleType:
    """Import parallel/deepspeed.py, and with it DeepSpeed, for `device`. Raises ConfigError where it is missing."""
    # Read once, at import: otherwise DeepSpeed takes a GPU wherever it sees one, precision.device=cpu or not.
    os.environ["DS_ACCELERATOR"] = device.type
    try:
        return importlib.import_module("vmamba_dist.parallel.deepspeed")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "deepspeed":
            raise
        raise ConfigError(
            "parallel.engine='deepspeed': the package deepspeed is not installed; "
            "pip install 'vmamba-dist[deepspeed]', or use parallel.engine=fsdp"
        ) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"parallel.deepspeed_config={str(path)!r}: {error.strerror}; name a JSON file, or leave it empty"
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"parallel.deepspeed_config={str(path)!r}: this is no JSON ({error}); mend the file"
        ) from error
    if not isinstance(found, dict):
        raise ConfigError(
            f"parallel.deepspeed_config={str(path)!r}: it holds a {type(found).__name__}; "
            'write an object, for example {"zero_optimization": {"reduce_bucket_size": 5e7}}'
        )
    return found


def _merge(config: dict[str, Any], theirs: Mapping[str, Any], file: str) -> None:
    """Add the user's keys to ours, in place; "auto", the Trainer's word for it, leaves ours."""
    for path, value in _leaves(theirs):
        if value in ("auto", {}):
            continue
        refused = next((key for key in _REFUSED if path == key or path.startswith(key + ".")), None)
        if refused is not None:
            if _is_off(_at(theirs, refused)):
                continue
            giver = _REFUSED[refused]
            fix = (
                f"set {giver} instead and remove the key"
                if giver
                else "it is not offered here; remove the key"
            )
            raise ConfigError(f"parallel.deepspeed_config={file!r}: {path}={value!r}: {fix}")
        top = path.partition(".")[0]
        if top not in _FREE and top not in _OURS:
            near = difflib.get_close_matches(top, [*_FREE, *_OURS], n=1)
            fix = f"did you mean {near[0]}?" if near else "remove the key"
            raise ConfigError(f"parallel.deepspeed_config={file!r}: {path}={value!r}: unknown key; {fix}")
        met = _conflict(config, path, value)
        if met is not None:
            giver = next(
                (g for key, g in _OURS.items() if key == met or key.startswith(met + ".")), "this project"
            )
            raise ConfigError(
                f"parallel.deepspeed_config={file!r}: {path}={value!r}, but {giver} makes {met} {_at(config, met)!r}; "
                "change that or remove the key"
            )
        *groups, leaf = path.split(".")
        place = config
        for group in groups:
            place = place.setdefault(group, {})
        place[leaf] = value


def _conflict(config: Mapping[str, Any], path: str, value: Any) -> str | None:
    """The key at which a user's value meets one of ours and says otherwise, at, above or below it; None if none."""
    keys = path.split(".")
    for above in (".".join(keys[:i]) for i in range(1, len(keys))):
        if not isinstance(_at(config, above), Mapping | NoneType):
            return above
    ours = _at(config, path)
    if isinstance(ours, Mapping):
        return path
    is_off = ours is None and value in (*_OFF, "none")
    return path if path in _OURS and ours != value and not is_off else None


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _at(values: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path, or None."""
    found: Any = values
    for key in path.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _is_off(value: Any) -> bool:
    """Whether a key asks for nothing: false, null, "auto", or a group that is not enabled."""
    if isinstance(value, Mapping):
        return not value or ("enabled" in value and value["enabled"] in _OFF)
    return value in _OFF
