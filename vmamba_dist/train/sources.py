"""What a run needs, checked before the first collective: enough samples, a batch that divides, a model.

Law: everything here is a function of the config, the shards and the world size, so all ranks find the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vmamba_dist.config.schema import Config, ConfigError
from vmamba_dist.core.dist import pick_device
from vmamba_dist.data.index import Index
from vmamba_dist.data.mixture import Mixture
from vmamba_dist.data.ondevice import check_gpu_decoding
from vmamba_dist.data.order import check_batch, choose_accumulate
from vmamba_dist.data.sets import Places
from vmamba_dist.models.variants import configured
from vmamba_kernels.backend import BackendError, resolve_backend


@dataclass(frozen=True)
class Sources:
    """The shards of a run and how its batch falls on this world."""

    train: Index | Mixture
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
        raise ConfigError(
            "data.train is not set: give a folder of shards, as `vmamba shards pack` makes it, an https:// or s3:// "
            "address, or a mixture of them"
        )
    places = Places(cfg.data, _kept_indices(cfg))
    train = open_training(cfg, places)
    accumulate = choose_accumulate(cfg.data.global_batch, world_size, cfg.parallel.micro_batch)
    check_batch(train.num_samples, cfg.data.global_batch, world_size, accumulate)
    num_classes = count_classes(cfg, train)
    evaluation = open_evaluation(cfg, num_classes, places)
    return Sources(train, evaluation, num_classes, accumulate)


def open_training(cfg: Config, places: Places) -> Index | Mixture:
    """Read and check the index of the training split, or of each source of a mixture."""
    named = cfg.data.train
    if isinstance(named, str):
        return places.open(named, cfg.data.split)
    parts = [
        places.open(source.path, cfg.data.split, key=f"data.train[{i}].path")
        for i, source in enumerate(named)
    ]
    return Mixture(tuple(parts), tuple(source.weight for source in named), cfg.data.global_batch)


def _kept_indices(cfg: Config) -> Path:
    return Path(cfg.run.dir) / "index"


def check_model(cfg: Config) -> None:
    """Refuse a model that cannot be made here."""
    configured(cfg.model)
    try:
        resolve_backend(cfg.model.scan_backend, pick_device(cfg.precision.device, local_rank=0))
    except BackendError as error:
        raise ConfigError(f"model.scan_backend={cfg.model.scan_backend}: {error}") from error


def open_evaluation(cfg: Config, num_classes: int, places: Places | None = None) -> Index:
    """Read and check the index of the evaluation split, for a model of `num_classes`."""
    places = places or Places(cfg.data, _kept_indices(cfg))
    key, named = "eval.data", cfg.eval.data
    if not named:
        key = "data.train"
        named = cfg.data.train if isinstance(cfg.data.train, str) else cfg.data.train[0].path
    index = places.open(named, cfg.eval.split, key=key)
    if index.num_samples == 0:
        raise ConfigError(f"{key}={index.place!r}: split {index.split!r} has no samples to evaluate on")
    if index.num_classes > num_classes:
        raise ConfigError(
            f"{key}={index.place!r} has {index.num_classes} classes, the model {num_classes}; "
            "evaluate on shards of the classes that it learns"
        )
    return index


def count_classes(cfg: Config, train: Index | Mixture) -> int:
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
