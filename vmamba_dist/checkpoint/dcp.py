"""The tensor files of a checkpoint: torch.distributed.checkpoint's, written chunk by chunk, read at any sharding.

Law: this is the only file that knows DCP. It plans nothing and talks to nobody: who writes what is decided before,
and what the ranks must tell each other is returned. What is read may come from outside, so an index that refers to
anything but an index's own classes is refused.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.utils.serialization import config

from vmamba_dist.checkpoint import store
from vmamba_dist.checkpoint.chunks import Chunk, whole
from vmamba_dist.checkpoint.store import CheckpointError

METADATA = ".metadata"  # DCP's index of tensors, written by rank 0 after all data

Source = Callable[[], Tensor]  # asked when its chunk is to be written, one at a time


def write_chunks(sources: Mapping[Chunk, Source], path: Path, rank: int) -> list[WriteResult]:
    """Write this rank's chunks into its own file, through to the disk; rank 0 needs the result for the index."""
    writer = _writer(path)
    writer.set_up_storage_writer(is_coordinator=rank == 0)
    plan = writer.prepare_local_plan(SavePlan([_item(chunk) for chunk in sources]))
    # The writer names a plan's files by its place among all plans; the others' may as well be empty.
    plan = writer.prepare_global_plan([SavePlan([])] * rank + [plan])[rank]
    planner = _Asks({_index(chunk): source for chunk, source in sources.items()})
    try:
        # torch.save would take a checksum of each tensor under Python's lock, with training waiting for it; ours
        # are the manifest's. The setting is this thread's (with torch 2.11 the process's, for so long).
        with config.patch("save.compute_crc32", False):  # type: ignore[attr-defined]
            results: list[WriteResult] = writer.write_data(plan, planner).wait()
    except RuntimeError as error:
        # torch.save hides an OSError of the file behind its own complaint.
        hidden = _hidden_os_error(error)
        if hidden is None:
            raise
        raise hidden from error
    for file in own_files(path, rank):
        store.sync_file(file)  # torch 2.11 syncs before it flushes the last bytes
    return results


def write_index(path: Path, chunks: Iterable[Chunk], results: Sequence[list[WriteResult]]) -> None:
    """Write the index over all ranks' chunks, through to the disk. Rank 0 alone, after all have written."""
    entries: dict[str, TensorStorageMetadata] = {}
    for chunk in sorted(chunks, key=lambda c: (c.name, c.offsets)):
        entry = entries.setdefault(
            chunk.name,
            TensorStorageMetadata(TensorProperties(dtype=chunk.dtype), torch.Size(chunk.shape), []),
        )
        entry.chunks.append(_place(chunk))
    _writer(path).finish(Metadata(dict(entries), {name: (name,) for name in entries}), list(results))
    store.sync_file(path / METADATA)


def own_files(path: Path, rank: int) -> list[Path]:
    """The data files that a rank has written."""
    return sorted(path.glob(f"__{rank}_*.distcp"))


def read_index(path: Path) -> dict[str, Chunk]:
    """What tensors a checkpoint holds: name → the whole of it. Raises CheckpointError where the index is none."""
    return _wholes(_read_metadata(path))


def fill(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Read into plain tensors and DTensors in place. A collective."""
    with _quiet():
        state_dict_loader.load(
            {name: tensor.detach() for name, tensor in tensors.items()},
            storage_reader=FileSystemReader(path),
            no_dist=not dist.is_initialized(),
        )


class TensorReader:
    """Reads single tensors of a checkpoint, whole, in this process alone."""

    def __init__(self, path: Path) -> None:
        self._metadata = _read_metadata(path)
        self._reader = FileSystemReader(path)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self.index = _wholes(self._metadata)

    def read(self, name: str) -> Tensor:
        """Return a tensor of the checkpoint, on the CPU."""
        found = torch.empty(self.index[name].shape, dtype=self.index[name].dtype)
        planner = DefaultLoadPlanner()
        planner.set_up_planner({name: found}, self._metadata, is_coordinator=True)
        plan = self._reader.prepare_local_plan(planner.create_local_plan())
        self._reader.read_data(plan, planner).wait()
        return found


class _Asks(DefaultSavePlanner):
    """Hands the writer each chunk when it comes to it."""

    def __init__(self, sources: Mapping[MetadataIndex, Source]) -> None:
        super().__init__()
        self._sources = sources

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._sources[write_item.index]()


def _writer(path: Path) -> FileSystemWriter:
    # Nothing is copied ahead: with a GPU about, that would wait for its stream, and what we hand over is staged.
    return FileSystemWriter(path, sync_files=True, overwrite=False, per_thread_copy_ahead=0)


def _index(chunk: Chunk) -> MetadataIndex:
    return MetadataIndex(chunk.name, chunk.offsets)


def _place(chunk: Chunk) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))


def _item(chunk: Chunk) -> WriteItem:
    data = TensorWriteData(_place(chunk), TensorProperties(dtype=chunk.dtype), torch.Size(chunk.shape))
    return WriteItem(_index(chunk), WriteItemType.SHARD, tensor_data=data)


def _hidden_os_error(error: BaseException) -> OSError | None:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep DCP from warning that a single process is a single process. For the main thread alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is", category=UserWarning)
        yield


class _IndexUnpickler(pickle.Unpickler):
    """Builds what DCP's index consists of and nothing else."""

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


def _read_metadata(path: Path) -> Metadata:
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


def _wholes(metadata: Metadata) -> dict[str, Chunk]:
    entries = metadata.state_dict_metadata
    others = [name for name, entry in entries.items() if not isinstance(entry, TensorStorageMetadata)]
    if others:
        raise CheckpointError(
            f"{', '.join(sorted(others)[:8])}: no tensors; another program has written these"
        )
    return {
        name: whole(name, entry.size, entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
