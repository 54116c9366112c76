"""Saving, finding and loading checkpoints, by all ranks together.

Law: what `newest` returns is bit-equal to what some `save` was given, whenever that save was killed and
whatever has happened to its files since. A failure on one rank is the same error on every rank.

The order of a save is the whole safety: an empty step-N.tmp, the DCP files (each rank writes its share of
the replicated tensors, fsynced), the sha256 of each file taken by the rank that wrote it, manifest.json
with fsync, the question whether a later attempt has begun, the rename, fsync of the parent, retention.
The hash is of the file read back after its fsync; on the writer's node the bytes come from the page cache,
so it costs the hashing alone. DCP has no checksum of its own: it loads a flipped bit silently.
"""

from __future__ import annotations

import logging
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from vmamba_dist.checkpoint import store
from vmamba_dist.checkpoint.store import CheckpointError, Damaged, Fault, FileRecord, Manifest, Meta
from vmamba_dist.config.schema import CheckpointConfig
from vmamba_dist.core.dist import World, from_main, gather
from vmamba_dist.core.rundir import RunDir, Superseded

_log = logging.getLogger(__name__)
T = TypeVar("T")

METADATA = ".metadata"  # DCP's index of tensors, written by rank 0 after all data


@dataclass(frozen=True)
class Found:
    """A checkpoint that all ranks have verified."""

    path: Path
    manifest: Manifest

    @property
    def meta(self) -> Meta:
        return self.manifest.meta


@dataclass(frozen=True)
class _Failure:
    rank: int
    superseded: bool
    text: str


class Checkpoints:
    """The checkpoints of one run. Every method is a collective."""

    def __init__(self, run: RunDir, cfg: CheckpointConfig, world: World, *, metric: str = "") -> None:
        """`metric` is the key of Meta.metrics that `keep_best` goes by (…loss: small is better)."""
        self.run = run
        self.cfg = cfg
        self.world = world
        self.metric = metric

    def save(self, tensors: Mapping[str, Tensor], meta: Meta) -> Path:
        """Write the checkpoint of meta.step and return its path; a whole one of that step is replaced.

        Replicated tensors are written once, spread over the ranks; DTensors by their owners. Raises
        CheckpointError on all ranks, naming rank, path and cause; the earlier checkpoints are untouched
        and step-N.tmp is gone. Raises Superseded where a later attempt has begun.
        """
        final = store.directory(self.run.checkpoints, meta.step)
        path = store.temporary(final)
        try:
            self._on_main(f"prepare {path}", lambda: self._prepare(final))
            _together(self.world, f"write {path}", lambda: _write(tensors, path))
            mine = _together(self.world, f"read back {path}", lambda: _hash_own_files(path, self.world.rank))
            manifest = Manifest(
                meta, {name: record for files in gather(mine) for name, record in files.items()}
            )
            self._on_main(f"publish {final}", lambda: self._publish(path, final, manifest))
        except CheckpointError:
            if self.world.is_main:
                shutil.rmtree(path, ignore_errors=True)  # the error itself is what has to be seen
            raise
        if self.world.is_main:
            self._retire(final)
        return final

    def newest(self, *, at: Path | None = None) -> Found | None:
        """Find and verify the newest whole checkpoint of this run; None where none was ever published.

        A damaged one is renamed step-N.corrupt-K, its faults are logged, and the one before is taken. Raises
        CheckpointError where there are only damaged ones: to begin anew would cut the run's metrics.
        With `at`, a checkpoint or a run directory, that one is meant: see `find`.
        """
        if at is not None:
            return find(at, self.world)
        self._on_main(f"look into {self.run.checkpoints}", lambda: store.recover(self.run.checkpoints))
        for path in reversed(_list(self.run.checkpoints, self.world)):
            try:
                return _verified(path, self.world)
            except Damaged as damage:
                self._set_aside(path, damage)
        self._on_main(f"look into {self.run.checkpoints}", self._refuse_to_begin_anew)
        return None

    def load(self, found: Found, tensors: Mapping[str, Tensor], *, allow_unused: Sequence[str] = ()) -> None:
        """Fill the tensors in place from a checkpoint: see the function `load`."""
        load(found, tensors, self.world, allow_unused=allow_unused)

    def _refuse_to_begin_anew(self) -> None:
        damaged = sorted(path.name for path in self.run.checkpoints.glob("step-*.corrupt-*"))
        if damaged:
            raise CheckpointError(
                f"none is whole, only {_some(damaged)}: put a whole one there, take another run.dir, "
                "or remove them to begin anew at step 1"
            )

    def _prepare(self, final: Path) -> None:
        self.run.check_attempt()
        store.prepare(final)

    def _publish(self, path: Path, final: Path, manifest: Manifest) -> None:
        store.write_manifest(path, manifest)
        self.run.check_attempt()
        store.publish(path, final)

    def _retire(self, final: Path) -> None:
        cfg = self.cfg
        try:
            store.retire(
                self.run.checkpoints,
                final,
                keep=cfg.keep,
                keep_every=cfg.keep_every,
                keep_best=cfg.keep_best,
                metric=self.metric,
            )
        except OSError as error:  # the new checkpoint is good: no reason to end the run
            _log.warning("an old checkpoint in %s could not be deleted: %s", self.run.checkpoints, error)

    def _set_aside(self, path: Path, damage: Damaged) -> None:
        def rename() -> None:
            self.run.check_attempt()
            kept = store.set_aside(path)
            _log.warning("checkpoint %s is damaged, kept as %s: %s", path.name, kept.name, damage)

        self._on_main(f"set {path} aside", rename)

    def _on_main(self, what: str, action: Callable[[], None]) -> None:
        """Do on rank 0 what is its alone; an error there is raised everywhere."""
        _together(self.world, what, lambda: action() if self.world.is_main else None)


def find(at: str | Path, world: World) -> Found:
    """Verify a checkpoint that somebody named: its directory, or a run directory, for its newest whole one.

    A collective. Nothing is renamed, since it may be someone else's. Raises CheckpointError where none is
    there or all are damaged.
    """
    place = Path(at).absolute()
    if store.step_of(place) is not None or (place / store.MANIFEST).exists():
        candidates = [place]
    else:
        candidates = _list(place / "checkpoints" if (place / "checkpoints").is_dir() else place, world)
    if not candidates:
        raise CheckpointError(f"{place}: neither a checkpoint nor a run directory that holds one")
    damages = []
    for candidate in reversed(candidates):
        try:
            return _verified(candidate, world)
        except Damaged as damage:
            damages.append(f"checkpoint {candidate} is damaged: {damage}")
            _log.warning("%s", damages[-1])
    raise CheckpointError(f"{'; '.join(damages)}; name another one")


def load(
    found: Found, tensors: Mapping[str, Tensor], world: World, *, allow_unused: Sequence[str] = ()
) -> None:
    """Fill the tensors in place from a checkpoint saved at any world size. Collective.

    Names, shapes and dtypes must agree both ways; tensors of the checkpoint whose names begin with one of
    `allow_unused`, as "optim." for an evaluation, may stay unread. Raises CheckpointError naming the keys.
    """
    _together(world, f"load {found.path}", lambda: _check_names(found.path, tensors, tuple(allow_unused)))
    _together(world, f"load {found.path}", lambda: _read(tensors, found.path))


def _write(tensors: Mapping[str, Tensor], path: Path) -> None:
    with _quiet_dcp():
        state_dict_saver.save(
            {name: tensor.detach() for name, tensor in tensors.items()},
            storage_writer=FileSystemWriter(path, sync_files=True, overwrite=False),
            no_dist=not dist.is_initialized(),
        )


def _hash_own_files(path: Path, rank: int) -> dict[str, FileRecord]:
    own = sorted(path.glob(f"__{rank}_*.distcp"))
    if rank == 0:
        own.append(path / METADATA)
    return {file.name: store.describe(file) for file in own}


def _check_names(path: Path, tensors: Mapping[str, Tensor], allow_unused: tuple[str, ...]) -> None:
    stored = _read_index(path).state_dict_metadata
    missing = sorted(name for name in tensors if name not in stored)
    unused = sorted(name for name in stored if name not in tensors and not name.startswith(allow_unused))
    differ = [
        f"{name} is {there}, here {here}"
        for name, tensor in sorted(tensors.items())
        if name in stored
        and (there := _stored_kind(stored[name])) != (here := _kind(tensor.shape, tensor.dtype))
    ]
    problems = []
    if missing:
        problems.append(f"it lacks {_some(missing)}")
    if unused:
        problems.append(f"nothing here takes its {_some(unused)}")
    if differ:
        problems.append(_some(differ))
    if problems:
        raise CheckpointError("; ".join(problems))


def _read(tensors: Mapping[str, Tensor], path: Path) -> None:
    with _quiet_dcp():
        state_dict_loader.load(
            {name: tensor.detach() for name, tensor in tensors.items()},
            storage_reader=FileSystemReader(path),
            no_dist=not dist.is_initialized(),
        )


@contextmanager
def _quiet_dcp() -> Iterator[None]:
    """Keep DCP from warning that a single process is a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is", category=UserWarning)
        yield


class _IndexUnpickler(pickle.Unpickler):
    """Builds what DCP's index consists of and nothing else: a checkpoint may come from outside."""

    _CLASSES: ClassVar = {
        "torch": {"Size"},
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.distributed.checkpoint.metadata": {
            "_MEM_FORMAT_ENCODING",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
        },
        "torch.serialization": {"_get_layout"},
        "pathlib": {"PosixPath"},
    }

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in self._CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return super().find_class(module, name)


def _read_index(path: Path) -> Metadata:
    try:
        with (path / METADATA).open("rb") as file:
            index = _IndexUnpickler(file).load()
        if not isinstance(index, Metadata):
            raise pickle.UnpicklingError(f"it is a {type(index).__name__}")
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path / METADATA} is no index of tensors, and loading refuses it: {error}"
        ) from error
    return index


def _stored_kind(entry: object) -> str:
    return (
        _kind(entry.size, entry.properties.dtype) if isinstance(entry, TensorStorageMetadata) else "no tensor"
    )


def _kind(shape: Sequence[int], dtype: torch.dtype) -> str:
    return f"{tuple(shape)} {str(dtype).removeprefix('torch.')}"


def _some(items: Sequence[str], most: int = 8) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def _list(checkpoints: Path, world: World) -> list[Path]:
    found = _together(
        world, f"list {checkpoints}", lambda: store.list_checkpoints(checkpoints) if world.is_main else []
    )
    return from_main(found)


def _verified(path: Path, world: World) -> Found:
    """Verify the checkpoint at `path`, each rank its share of the files; raise Damaged on all ranks."""
    manifest, damage = from_main(
        _together(world, f"read {path}", lambda: _manifest(path) if world.is_main else (None, ""))
    )
    if manifest is None:
        raise Damaged(damage)
    shares = store.share(manifest, world.rank, world.size)
    mine = _together(world, f"verify {path}", lambda: store.verify_files(path, manifest, shares))
    faults = [fault for each in gather(mine) for fault in each]
    if faults:
        # Rank 0 looks again: on storage that not all machines share, or share late, nothing is damaged.
        names = [fault.file for fault in faults]
        again = _together(
            world, f"verify {path}", lambda: _confirmed(path, manifest, names) if world.is_main else []
        )
        raise Damaged(", ".join(str(fault) for fault in from_main(again)))
    return Found(path, manifest)


def _manifest(path: Path) -> tuple[Manifest | None, str]:
    try:
        manifest = store.read_manifest(path)
        store.check_step(path, manifest)
    except Damaged as damage:
        return None, str(damage)
    return manifest, ""


def _confirmed(path: Path, manifest: Manifest, names: Sequence[str]) -> list[Fault]:
    faults = store.verify_files(path, manifest, names)
    if len(faults) < len(names):
        raise CheckpointError(
            f"other ranks find {_some(names)} damaged, rank 0 does not: "
            "put run.dir on storage that all machines share"
        )
    return faults


def _together(world: World, what: str, action: Callable[[], T]) -> T:
    """Do something on every rank; where it fails on any, raise the same error on all. A collective.

    Catches what storage and checkpoints cause; anything else is a defect and stays as it is.
    """
    failure: _Failure | None = None
    cause: BaseException | None = None
    result: list[T] = []
    try:
        result.append(action())
    except (OSError, CheckpointError, Superseded) as error:
        failure = _Failure(world.rank, isinstance(error, Superseded), str(error) or repr(error))
        cause = error
    except CheckpointException as error:  # DCP has told every rank already, and is no Exception
        rank, (inner, _) = next(iter(error.failures.items()))
        failure = _Failure(rank, False, f"{type(inner).__name__}: {inner}")
        cause = error
    first = next((f for f in gather(failure) if f is not None), None)
    if first is None:
        return result[0]
    kind = Superseded if first.superseded else CheckpointError
    message = first.text if first.superseded else f"rank {first.rank} could not {what}: {first.text}"
    raise kind(message) from cause
