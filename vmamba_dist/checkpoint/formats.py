"""The formats that `vmamba convert` reads and writes, each behind the same two seams.

Law: a source tells its tensors by canonical name (model.…, ema.…, optim.….{exp_avg,exp_avg_sq,step}) and reads one at
a time; what a target needs and a source lacks is said, never made up here. Files from outside are read as tensors
and plain values alone: nothing in them can run.
"""

from __future__ import annotations

import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from vmamba_dist.checkpoint import dcp, store
from vmamba_dist.checkpoint.chunks import Chunk, deal, whole
from vmamba_dist.checkpoint.store import Manifest, Meta
from vmamba_dist.config import from_dict
from vmamba_dist.config.schema import ConfigError
from vmamba_dist.models.official import load_official, official_shapes
from vmamba_dist.models.variants import overrides_of
from vmamba_dist.models.vmamba import VMamba, create_model

BACKBONE = "backbone."  # of an objective's names: the rest is the model's own
ABOUT = "vmamba"  # the key under which a file of weights carries the checkpoint's description
FILE_BYTES = (
    2**29
)  # of a canonical checkpoint that one process writes: DCP keeps a file's tensors until it is written

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}


@dataclass(frozen=True)
class Source:
    """Tensors by canonical name, read one at a time, and what is known of where they come from."""

    index: Mapping[str, Chunk]
    read: Callable[[str], Tensor]
    meta: Meta | None = None  # None: written by others


def rebuilt(meta: Meta) -> VMamba:
    """The backbone that a checkpoint is of, on the meta device."""
    model = from_dict({"model": meta.extra["config"]["model"]}).model
    with torch.device("meta"):
        return create_model(
            model.name,
            num_classes=int(meta.trajectory["num_classes (resolved)"]),
            scan_pattern=model.scan_pattern,
            **overrides_of(model),
        )


# Canonical


def open_canonical(path: Path, meta: Meta) -> Source:
    """A checkpoint that has been verified."""
    reader = dcp.TensorReader(path)
    return Source(reader.index, reader.read, meta)


def write_canonical(source: Source, meta: Meta, path: Path) -> None:
    """Write a whole checkpoint into an empty directory, in files of about half a GiB, and read it back."""
    chunks = list(source.index.values())
    count = max(1, -(-sum(chunk.nbytes for chunk in chunks) // FILE_BYTES))
    results = []
    for number, part in enumerate(deal([chunks] * count)):  # as that many ranks would
        sources = {chunk: _reading(source, chunk.name) for chunk in part}
        results.append(dcp.write_chunks(sources, path, number))
    dcp.write_index(path, chunks, results)
    files = {file.name: store.describe(file) for file in path.iterdir()}
    store.write_manifest(path, Manifest(meta, files))
    faults = store.verify_checkpoint(path)
    assert not faults, faults


def _reading(source: Source, name: str) -> dcp.Source:
    return lambda: source.read(name).contiguous()


# One file of weights: safetensors


def open_safetensors(path: Path) -> Source:
    """The weights of a safetensors file, under the backbone's names."""
    return open_safetensors_file(path, f"model.{BACKBONE}")


def open_safetensors_file(path: Path, prefix: str = "") -> Source:
    """The tensors of a safetensors file; `prefix` makes their names canonical ones."""
    try:
        file: Any = safetensors.safe_open(str(path), framework="pt")
    except (safetensors.SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: no safetensors file: {error}") from error
    dtypes = {code: dtype for dtype, code in _DTYPES.items()}
    index = {}
    for name in file.keys():  # noqa: SIM118 - it is no mapping
        view = file.get_slice(name)
        if view.get_dtype() not in dtypes:
            raise ConfigError(f"{path}: {name} is {view.get_dtype()}; known are {', '.join(dtypes)}")
        index[prefix + name] = whole(prefix + name, view.get_shape(), dtypes[view.get_dtype()])
    about = (file.metadata() or {}).get(ABOUT)
    return Source(index, lambda name: file.get_tensor(name.removeprefix(prefix)), _told(about, path))


def write_safetensors(source: Source, meta: Meta, weights: str, path: Path) -> None:
    """Write the backbone's weights under its own names, one at a time."""
    names = backbone_names(source, weights)
    about = {
        "format": "pt",  # what other tools look for
        "model": meta.extra["config"]["model"]["name"],
        "num_classes": str(meta.trajectory["num_classes (resolved)"]),
        "weights": weights,
        "step": str(meta.step),
        ABOUT: json.dumps(asdict(shareable(meta))),
    }
    write_safetensors_file(path, {n: source.index[full] for n, full in names.items()}, source.read, about)


def write_safetensors_file(
    path: Path, chunks: Mapping[str, Chunk], read: Callable[[str], Tensor], about: Mapping[str, str]
) -> None:
    """Write tensors, read by their canonical names, under the names given; the library would hold them all."""
    header: dict[str, Any] = {"__metadata__": dict(about)}
    end = 0
    # The widest elements first, so that each tensor lies aligned, as the library lays them.
    order = sorted(chunks.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    for name, chunk in order:
        span = [end, end := end + chunk.nbytes]
        header[name] = {"dtype": _DTYPES[chunk.dtype], "shape": list(chunk.shape), "data_offsets": span}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, chunk in order:
            file.write(read(chunk.name).contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


# One file of weights: official


def open_official(path: Path, model: str | None) -> Source:
    """Official weights, by way of a model in memory; `model_ema`, where the file has it, as the average."""
    content = load_plain(path, mmap=True)
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path}: holds a {type(content).__name__}; official weights are a dict")
    meta = _told(content.get(ABOUT), path)
    content = {key: value for key, value in content.items() if key != ABOUT}
    tensors: dict[str, Tensor] = {}
    for key, prefix in (("model", "model"), ("model_ema", "ema")):
        if prefix == "ema" and not isinstance(content.get(key), Mapping):
            continue
        built = _built(meta, model, path, content.get(key, content))
        try:
            load_official(built, content, key=key)
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from error
        tensors |= {f"{prefix}.{BACKBONE}{name}": p.detach() for name, p in built.state_dict().items()}
    return Source(
        {name: whole(name, t.shape, t.dtype) for name, t in tensors.items()}, tensors.__getitem__, meta
    )


def write_official(source: Source, meta: Meta, weights: str, path: Path) -> None:
    """Write the weights under official names in official shapes, as {"model": …}; all are in memory at once."""
    names = backbone_names(source, weights)
    shapes = official_shapes(rebuilt(meta))
    tensors = {name: source.read(names[name]).view(shape) for name, shape in shapes.items()}
    with path.open("wb") as file:
        torch.save({"model": tensors, ABOUT: json.dumps(asdict(shareable(meta)))}, file)
        file.flush()
        os.fsync(file.fileno())


def _built(meta: Meta | None, name: str | None, path: Path, weights: Any) -> VMamba:
    """The model that official weights are of, in memory."""
    if meta is not None:
        built = rebuilt(meta)
    elif name is not None:
        head = next((v for k, v in weights.items() if k.endswith("head.weight")), None)
        if head is None:
            raise ConfigError(f"{path}: no head.weight in it, so no weights of a VMamba classifier")
        with torch.device("meta"):
            built = create_model(name, num_classes=len(head))
    else:
        raise needs_model(path)
    return built.to_empty(device="cpu")


# What they share


def needs_model(path: Path) -> ConfigError:
    return ConfigError(f"{path} does not say which model it is of; add --model NAME, as vmamba_tiny_s1l8")


def backbone_names(source: Source, weights: str) -> dict[str, str]:
    """The backbone's own name → the canonical one of its raw or averaged weights.

    Raises ConfigError where the source has no such weights.
    """
    prefix = f"{'ema' if weights == 'ema' else 'model'}.{BACKBONE}"
    found = {name.removeprefix(prefix): name for name in source.index if name.startswith(prefix)}
    if not found:
        raise ConfigError(f"--weights {weights}: there are none; it has {', '.join(kinds(source.index))}")
    return found


def kinds(names: Iterable[str]) -> list[str]:
    """What a source holds, in words: raw, ema, moments."""
    words = {"model": "raw", "ema": "ema", "optim": "moments"}
    return [word for prefix, word in words.items() if any(name.startswith(f"{prefix}.") for name in names)]


def shareable(meta: Meta) -> Meta:
    """The description without what only this machine's owner needs: where things lie and how it was launched."""
    config = {
        group: values
        for group, values in meta.extra["config"].items()
        if group in ("model", "augment", "objective", "ema", "optim", "schedule")
    }
    config["data"] = {"image_size": meta.extra["config"]["data"]["image_size"]}
    return Meta(**{**asdict(meta), "extra": {"config": config}})


def load_plain(path: Path, *, mmap: bool = False, stand_ins: Iterable[str] = ()) -> Any:
    """Read a file of torch.save: tensors and plain values. Objects of `stand_ins` come as empty ones.

    Raises ConfigError for anything else in it.
    """
    allowed: list[Any] = [(_StandIn, name) for name in stand_ins]
    try:
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            mapped = mmap and zipfile.is_zipfile(path)  # the format before torch 1.6 cannot be
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"{path}: only tensors and plain values are read, and there is something else in it: {first}"
        ) from error


class _StandIn:
    """In the place of a foreign object that nobody asks for."""

    def __init__(self, *args: object) -> None:
        pass


def _told(text: Any, path: Path) -> Meta | None:
    """The description that a file of ours carries."""
    if text is None:
        return None
    try:
        return Meta(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: its description under {ABOUT!r} is not ours: {error}") from error
