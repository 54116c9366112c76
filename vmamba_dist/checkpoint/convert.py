"""`vmamba convert FROM TO`: a checkpoint in another format.

Law: what is there stays as it is unless --overwrite is given; the result is written beside its name and renamed when
whole. Every pair of formats goes: a source is brought to canonical names, and what a training state needs beyond
weights is made new (an average that equals the weights, moments of zero at step 0), and said.

Tensors pass one at a time, so a model of two billion parameters needs little memory: about half a GiB for a canonical
target, a file of it. Official files alone are held whole in memory, both ways, since torch.save knows nothing else.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vmamba_dist.checkpoint import formats, store, universal
from vmamba_dist.checkpoint.chunks import Chunk, whole
from vmamba_dist.checkpoint.formats import Source
from vmamba_dist.checkpoint.save import find
from vmamba_dist.checkpoint.store import Meta
from vmamba_dist.config import digest, load, to_dict, trajectory
from vmamba_dist.config.schema import ConfigError
from vmamba_dist.core.dist import World
from vmamba_dist.core.rundir import sync_directory
from vmamba_dist.core.state import TrainState
from vmamba_dist.models.vmamba import create_model

CANONICAL, SAFETENSORS, OFFICIAL, UNIVERSAL = FORMATS = ("canonical", "safetensors", "official", "universal")
_SUFFIXES = {".safetensors": SAFETENSORS, ".pth": OFFICIAL, ".pt": OFFICIAL}
_HERE = World(0, 1, 0, torch.device("cpu"))


@dataclass(frozen=True)
class Converted:
    """What a conversion did, for whoever asked."""

    source: str  # its format
    target: str
    meta: Meta
    made: list[str]  # kinds of tensors that the source lacked
    left: list[str]  # kinds of tensors that the target has no place for
    nbytes: int
    weights: str  # raw or ema, where the target holds one of them


def convert(
    source: Path,
    target: Path,
    *,
    format: str | None = None,
    weights: str | None = None,
    model: str | None = None,
    overwrite: bool = False,
) -> Converted:
    """Convert between formats that the paths tell, or `format` for the target.

    `weights`, raw or ema, is for targets that hold one of them; by default the average where there is one. `model`
    names what a source does not. Raises ConfigError, or CheckpointError for a damaged source.
    """
    source_format, target_format = format_of(source), format or _format_to_be(target)
    holds_one = target_format in (SAFETENSORS, OFFICIAL)
    if weights and not holds_one:
        raise ConfigError(
            f"--weights {weights}: a {target_format} checkpoint holds all weights; leave it out"
        )
    if target.exists() and not overwrite:
        raise ConfigError(f"{target} is there already; add --overwrite to replace it")
    if target.exists() and target.samefile(source):
        raise ConfigError(f"{target} is what it would be made of; give another place")
    opened, meta = _open(source, source_format, model)
    made: list[str] = []
    left: list[str] = []
    if holds_one:
        weights = weights or ("ema" if any(name.startswith("ema.") for name in opened.index) else "raw")
        left = [kind for kind in formats.kinds(opened.index) if kind != weights]
    else:
        had = formats.kinds(opened.index)
        opened = _completed(opened, meta)
        made = [kind for kind in formats.kinds(opened.index) if kind not in had]
    if target_format == CANONICAL and store.step_of(target) not in (None, meta.step):
        raise ConfigError(f"{target}: the checkpoint is of step {meta.step}; call it step-{meta.step:09d}")

    beside = target.with_name(f"{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove(beside)  # of a conversion that was killed
        if target_format in (CANONICAL, UNIVERSAL):
            beside.mkdir()
        if target_format == CANONICAL:
            formats.write_canonical(opened, meta, beside)
        elif target_format == UNIVERSAL:
            universal.write_universal(opened, meta, beside)
        elif target_format == SAFETENSORS:
            formats.write_safetensors(opened, meta, weights or "raw", beside)
        else:
            formats.write_official(opened, meta, weights or "raw", beside)
        nbytes = sum(
            f.stat().st_size for f in (beside.rglob("*") if beside.is_dir() else [beside]) if f.is_file()
        )
        _put(beside, target)
    except BaseException as error:
        if beside.parent.is_dir():
            _remove(beside)
        if isinstance(error, OSError):
            raise ConfigError(f"{target} could not be written: {error}") from error
        raise
    return Converted(source_format, target_format, meta, made, left, nbytes, weights or "")


def format_of(path: Path) -> str:
    """The format of what lies at a path. Raises ConfigError where nothing known does."""
    if path.is_dir():
        return UNIVERSAL if universal.is_universal(path) else CANONICAL
    if not path.exists():
        raise ConfigError(f"{path} is not there")
    return _of_file(path)


def _format_to_be(path: Path) -> str:
    if path.suffix in _SUFFIXES:
        return _of_file(path)
    return UNIVERSAL if "universal" in path.name else CANONICAL


def _of_file(path: Path) -> str:
    if path.suffix not in _SUFFIXES:
        raise ConfigError(f"{path}: of no known format; files end in {', '.join(_SUFFIXES)}")
    return _SUFFIXES[path.suffix]


def _open(path: Path, format: str, model: str | None) -> tuple[Source, Meta]:
    """The source, and its description: its own, or a new one of the model that was named."""
    steps = samples = 0
    if format == CANONICAL:
        found = find(path, _HERE)
        opened = formats.open_canonical(found.path, found.meta)
    elif format == SAFETENSORS:
        opened = formats.open_safetensors(path)
    elif format == OFFICIAL:
        opened = formats.open_official(path, model)
    else:
        opened, steps, samples = universal.open_universal(path, model)
    own = opened.meta
    if own is not None and model is not None and own.extra["config"]["model"]["name"] != model:
        raise ConfigError(
            f"--model {model}: {path} says it is {own.extra['config']['model']['name']}; leave it out"
        )
    if own is None and model is None:
        raise formats.needs_model(path)
    if own is not None and any(name.startswith("optim.") for name in opened.index):
        meta = own
    else:
        meta = _begun(own, model or "", _num_classes(opened, path), steps, samples)
    _check_model(opened, meta, path)
    return opened, meta


def _num_classes(opened: Source, path: Path) -> int:
    """How many the classifier tells apart."""
    for prefix in ("model", "ema"):
        head = opened.index.get(f"{prefix}.{formats.BACKBONE}classifier.head.weight")
        if head is not None:
            return head.shape[0]
    raise ConfigError(f"{path}: no classifier.head.weight in it, so no weights of a VMamba classifier")


def _begun(own: Meta | None, model: str, num_classes: int, steps: int, samples: int) -> Meta:
    """The description of a training state that has weights and, but for its counters, no past."""
    config = load([], base=own.extra["config"]) if own else load([f"model.name={model}"])
    identity = trajectory(config) | {"num_classes (resolved)": num_classes}
    state = TrainState(step=steps, samples=samples)
    return Meta(
        step=steps,
        samples=samples,
        epoch=0,
        state=state.to_dict(),
        world_size=1,
        engine=config.parallel.engine,
        config_digest=digest(identity),
        trajectory=identity,
        extra={"config": to_dict(config)},
    )


def _check_model(opened: Source, meta: Meta, path: Path) -> None:
    """Raise ConfigError where the weights are not those of the model that they are said to be of."""
    built = formats.rebuilt(meta)
    expected = {formats.BACKBONE + name: tuple(p.shape) for name, p in built.named_parameters()}
    for prefix in ("model.", "ema."):
        found = {n.removeprefix(prefix): c.shape for n, c in opened.index.items() if n.startswith(prefix)}
        if not found:
            continue
        wrong = [f"it lacks {name}" for name in expected if name not in found]
        wrong += [f"unknown {name}" for name in found if name not in expected]
        wrong += [
            f"{name} is {found[name]}, must be {shape}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ]
        if wrong:
            name = meta.extra["config"]["model"]["name"]
            raise ConfigError(f"{path} does not hold the weights of {name}: {'; '.join(wrong[:6])}")


def _completed(opened: Source, meta: Meta) -> Source:
    """The source with what a training state needs: an average that equals the weights, a fresh optimizer."""
    index = dict(opened.index)
    stand_for: dict[str, str | None] = {}  # made tensor → the one it equals; None: zeros

    def add(name: str, chunk: Chunk, equals: str | None) -> None:
        if name not in index:
            index[name] = dataclasses.replace(chunk, name=name)
            stand_for[name] = equals

    for name in [name for name in opened.index if name.startswith("model.")]:
        bare, chunk = name.removeprefix("model."), opened.index[name]
        if meta.extra["config"]["ema"]["enabled"]:
            add(f"ema.{bare}", chunk, name)
        for moment in ("exp_avg", "exp_avg_sq"):
            add(f"optim.{bare}.{moment}", chunk, None)
        add(f"optim.{bare}.step", whole("", (), torch.float32), None)

    def read(name: str) -> Tensor:
        if name not in stand_for:
            return opened.read(name)
        equals = stand_for[name]
        return opened.read(equals) if equals else torch.zeros(index[name].shape, dtype=index[name].dtype)

    return Source(index, read, opened.meta)


def _put(beside: Path, target: Path) -> None:
    """Give what was written its name; what had it goes."""
    old = target.with_name(f"{target.name}.old")
    _remove(old)
    if target.exists() and target.is_dir():
        target.rename(old)
    beside.replace(target)
    sync_directory(target.parent)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def main(words: Sequence[str]) -> int:
    """Convert, and say what was kept, made and left out."""
    parser = argparse.ArgumentParser(
        prog="vmamba convert",
        description="A checkpoint in another format: canonical (a run, or a step-… folder), safetensors (weights "
        "alone), official VMamba .pth (weights alone), or DeepSpeed's universal folder.",
    )
    parser.add_argument("source", metavar="FROM", type=Path, help="a run, a checkpoint or a file of weights")
    parser.add_argument("target", metavar="TO", type=Path, help="its name tells the format, see --format")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="of TO; else by its name: .safetensors, .pth, a folder with `universal` in its name, or canonical",
    )
    parser.add_argument(
        "--weights", choices=("raw", "ema"), help="for a file of weights; the average where there is one"
    )
    parser.add_argument("--model", metavar="NAME", help="what FROM is of, where it does not say so itself")
    parser.add_argument("--overwrite", action="store_true", help="replace what is at TO")
    given = parser.parse_args(words)
    if given.model is not None:
        _known(given.model)
    done = convert(
        given.source,
        given.target,
        format=given.format,
        weights=given.weights,
        model=given.model,
        overwrite=given.overwrite,
    )
    name = done.meta.extra["config"]["model"]["name"]
    held = f"{done.weights} weights" if done.weights else "weights and training state"
    print(f"{given.source} ({done.source}) → {given.target} ({done.target})")
    print(f"{name}, step {done.meta.step}, {held}, {done.nbytes / 2**20:.1f} MiB")
    if done.left:
        print(f"left out: {', '.join(done.left)}")
    if done.made:
        news = {"ema": "an average that equals the weights", "moments": "an optimizer's moments of zero"}
        print(f"made new: {', '.join(news.get(kind, kind) for kind in done.made)}")
    return 0


def _known(model: str) -> None:
    try:
        with torch.device("meta"):
            create_model(model)
    except ValueError as error:
        raise ConfigError(f"--model {model}: {error}") from error
