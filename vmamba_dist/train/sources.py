"""What a run needs, checked before the first collective: enough samples, a batch that divides, a model.

Law: everything here is a function of the config, the shards and the world size, so all ranks find the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from vmamba_dist.config.schema import Config, ConfigError, EvalConfig
from vmamba_dist.core.dist import pick_device
from vmamba_dist.data.ondevice import check_gpu_decoding
from vmamba_dist.data.order import check_batch, choose_accumulate
from vmamba_dist.data.shards import Index
from vmamba_dist.data.sidecar import open_index
from vmamba_dist.models.variants import get_variant
from vmamba_kernels.backend import BackendError, resolve_backend


@dataclass(frozen=True)
class Sources:
    """The shards of a run and how its batch falls on this world."""

    train: Index
    evaluation: Index
    num_classes: int
    accumulate: int


def open_sources(cfg: Config, world_size: int) -> Sources:
    """Read and check the indices. Raises ConfigError naming the key, the numbers and the fix."""
    check_model(cfg)
    if cfg.data.decoder == "gpu":
        check_gpu_decoding(pick_device(cfg.precision.device, local_rank=0))
    cfg.parallel.copies_and_shards(world_size)
    if not cfg.data.train:
        raise ConfigError("data.train is not set: give a folder of shards, as `vmamba shards pack` makes it")
    train = open_index(cfg.data.train, cfg.data.split)
    accumulate = choose_accumulate(cfg.data.global_batch, world_size, cfg.parallel.micro_batch)
    check_batch(train.num_samples, cfg.data.global_batch, world_size, accumulate)
    num_classes = count_classes(cfg, train)
    evaluation = open_evaluation(cfg.eval, default=cfg.data.train, num_classes=num_classes)
    return Sources(train, evaluation, num_classes, accumulate)


def check_model(cfg: Config) -> None:
    """Refuse a model that cannot be made here."""
    try:
        get_variant(cfg.model.name)
    except ValueError as error:
        raise ConfigError(f"model.name={cfg.model.name}: {error}") from error
    try:
        resolve_backend(cfg.model.scan_backend, pick_device(cfg.precision.device, local_rank=0))
    except BackendError as error:
        raise ConfigError(f"model.scan_backend={cfg.model.scan_backend}: {error}") from error


def open_evaluation(cfg: EvalConfig, *, default: str, num_classes: int) -> Index:
    """Read and check the index of the evaluation split, for a model of `num_classes`."""
    key = "eval.data" if cfg.data else "data.train"
    index = open_index(cfg.data or default, cfg.split, key=key)
    if index.num_samples == 0:
        raise ConfigError(f"{key}={str(index.root)!r}: split {index.split!r} has no samples to evaluate on")
    if index.num_classes > num_classes:
        raise ConfigError(
            f"{key}={str(index.root)!r} has {index.num_classes} classes, the model {num_classes}; "
            "evaluate on shards of the classes that it learns"
        )
    return index


def count_classes(cfg: Config, train: Index) -> int:
    """model.num_classes, or what the shards' index says."""
    wanted = cfg.model.num_classes
    if wanted is None:
        return train.num_classes
    if wanted < train.num_classes:
        raise ConfigError(
            f"model.num_classes={wanted}: the shards have {train.num_classes} classes; "
            f"use {train.num_classes} or more, or leave it null"
        )
    return wanted
