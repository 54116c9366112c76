"""Checkpoints as directories: their names, manifest, publication, verification and retention.

Law: a directory named step-000000123 that holds a manifest and matches it is a checkpoint; nothing else is.
It gets that name in one rename, after every byte of it is on the disk, and loses it in one rename before
its first byte is removed. Only names of ours are ever touched:

    step-000000123            a checkpoint
    step-000000123.tmp        being written, or being deleted; the next save removes it
    step-000000123.replaced   set aside by a second save of the same step; put back if that one never came
    step-000000123.corrupt-1  did not match its manifest; kept for whoever wants to look

Everything here works on paths alone: no collective, no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vmamba_dist.config.schema import UserError
from vmamba_dist.core.rundir import sync_directory

FORMAT = 1
MANIFEST = "manifest.json"
_WHOLE = re.compile(r"step-(\d{9,})")
_LEFT_OVER = re.compile(r"step-\d{9,}\.tmp")
_REPLACED = re.compile(r"(step-\d{9,})\.replaced")


class CheckpointError(UserError, RuntimeError):
    """A checkpoint cannot be written, found or read; the message names the rank, the path and the cause."""


class Damaged(CheckpointError):
    """A directory that is no checkpoint, or not the one its manifest describes."""


@dataclass(frozen=True)
class Meta:
    """What a checkpoint says about itself. Everything in it is JSON."""

    step: int  # updates applied
    samples: int  # seen
    epoch: int
    state: dict[str, Any]  # of the trainer, as it wants it back
    world_size: int  # that saved it
    engine: str  # that saved it
    config_digest: str
    trajectory: dict[str, Any]  # config fields that a resume must match
    metrics: dict[str, float] = field(default_factory=dict)  # of the evaluation at this step; may be empty
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FileRecord:
    """What a file of a checkpoint must be."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json: the checkpoint's description and all of its other files."""

    meta: Meta
    files: dict[str, FileRecord]


@dataclass(frozen=True)
class Fault:
    """One way in which a directory differs from its manifest."""

    file: str
    reason: str  # missing | truncated: … | sha256 differs | …

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}"


def directory(checkpoints: Path, step: int) -> Path:
    """Return the final place of the checkpoint of a step."""
    return checkpoints / f"step-{step:09d}"


def temporary(final: Path) -> Path:
    """Return the place where a checkpoint is written, or goes to be deleted."""
    return final.with_name(f"{final.name}.tmp")


def step_of(path: Path) -> int | None:
    """Return the step that a checkpoint directory's name says, None for any other name."""
    match = _WHOLE.fullmatch(path.name)
    return int(match[1]) if match else None


def list_checkpoints(checkpoints: str | Path) -> list[Path]:
    """Return the directories named as checkpoints are, oldest step first. Looks at names only."""
    try:
        found = [
            (step, entry) for entry in Path(checkpoints).iterdir() if (step := step_of(entry)) is not None
        ]
    except FileNotFoundError:
        return []
    return [entry for _, entry in sorted(found) if entry.is_dir()]


def list_unfinished(checkpoints: str | Path) -> list[Path]:
    """Return the directories of checkpoints that are being written or deleted, or were when a kill came."""
    try:
        return sorted(path for path in Path(checkpoints).iterdir() if _LEFT_OVER.fullmatch(path.name))
    except FileNotFoundError:
        return []


def read_manifest(path: str | Path) -> Manifest:
    """Read manifest.json of a checkpoint directory.

    Raises Damaged where there is none or it is not what was written, CheckpointError where a newer version
    wrote it.
    """
    file = Path(path) / MANIFEST
    try:
        content = json.loads(file.read_bytes())
        if not isinstance(content, dict):
            raise Damaged(f"{file}: no JSON object")
        version, digest = content["format"], content.pop("digest")
        if digest != _digest(content):  # a rule of every format, so that a flipped bit is never a new format
            raise Damaged(f"{file}: its content differs from its own digest")
        if version != FORMAT:
            raise CheckpointError(f"{file}: format {version}, but {FORMAT} is read here; use what wrote it")
        files = {name: FileRecord(**record) for name, record in content["files"].items()}
        meta = Meta(**{name: content[name] for name in Meta.__dataclass_fields__})
    except FileNotFoundError:
        raise Damaged(f"{file}: missing") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{file}: not a manifest ({type(error).__name__}: {error})") from error
    return Manifest(meta, files)


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write manifest.json into a checkpoint directory, and the directory's names, through to the disk."""
    files = {name: asdict(record) for name, record in sorted(manifest.files.items())}
    # Through JSON once, so that the digest is of what a reader gets (keys that were numbers, tuples).
    content = json.loads(json.dumps({"format": FORMAT, **asdict(manifest.meta), "files": files}))
    content["digest"] = _digest(content)
    with (path / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_directory(path)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sync_file(file: Path) -> None:
    """Put what was written to a file through to the disk."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def sync_tree(folder: Path) -> None:
    """Put every file and name below a folder through to the disk; cheaper at the end than one by one."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_file():
            sync_file(path)
        else:
            sync_directory(path)


def describe(file: Path) -> FileRecord:
    """Size and sha256 of a file, read back from the file system."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return FileRecord(stream.tell(), digest)


def verify_checkpoint(path: str | Path) -> list[Fault]:
    """Return every fault of a checkpoint directory; none means whole. Reads all of it.

    Raises CheckpointError where a newer version wrote it, OSError where a file is there and cannot be read.
    """
    try:
        manifest = read_manifest(path)
        check_step(Path(path), manifest)
    except Damaged as fault:
        return [Fault(MANIFEST, str(fault))]
    return verify_files(Path(path), manifest, manifest.files)


def check_step(path: Path, manifest: Manifest) -> None:
    """Raise Damaged where the directory's name and its manifest speak of different steps."""
    if step_of(path) not in (None, manifest.meta.step):
        raise Damaged(f"{path / MANIFEST}: is of step {manifest.meta.step}")


def verify_files(path: Path, manifest: Manifest, names: Iterable[str]) -> list[Fault]:
    """Return the faults of some of a checkpoint's files: sizes of all first, then contents.

    Raises OSError where a file is there and cannot be read: that is a fault of the storage, perhaps a
    passing one, and no reason to give a checkpoint up.
    """
    faults, sound = [], []
    for name in names:
        expected = manifest.files[name].bytes
        try:
            size = (path / name).stat().st_size
        except FileNotFoundError:
            faults.append(Fault(name, "missing"))
            continue
        if size < expected:
            faults.append(Fault(name, f"truncated: {size} bytes of {expected}"))
        elif size > expected:
            faults.append(Fault(name, f"too long: {size} bytes, should be {expected}"))
        else:
            sound.append(name)
    for name in sound:
        try:
            found = describe(path / name)
        except FileNotFoundError:  # a run that goes on may delete what it no longer keeps at any moment
            faults.append(Fault(name, "missing"))
            continue
        if found.sha256 != manifest.files[name].sha256:
            faults.append(Fault(name, "sha256 differs"))
    return faults


def share(manifest: Manifest, rank: int, size: int) -> list[str]:
    """Return the files that one of `size` ranks verifies: dealt largest first, each file to exactly one."""
    by_size = sorted(manifest.files, key=lambda name: (-manifest.files[name].bytes, name))
    return by_size[rank::size]


def set_aside(path: Path) -> Path:
    """Rename a damaged directory to the first free step-N.corrupt-K; return the new path."""
    taken = 1
    while (target := path.with_name(f"{path.name}.corrupt-{taken}")).exists():
        taken += 1
    path.rename(target)
    sync_directory(path.parent)
    return target


def prepare(final: Path) -> Path:
    """Return an empty temporary directory for a checkpoint; remove what earlier kills left behind."""
    final.parent.mkdir(parents=True, exist_ok=True)
    recover(final.parent)
    for entry in list(final.parent.iterdir()):
        if _LEFT_OVER.fullmatch(entry.name):
            shutil.rmtree(entry)
    path = temporary(final)
    path.mkdir()
    return path


def publish(path: Path, final: Path) -> None:
    """Give a written, synced temporary directory its final name; a checkpoint already there is replaced."""
    replaced = final.with_name(f"{final.name}.replaced")
    replaces = final.exists()
    if replaces:
        final.rename(replaced)
    path.rename(final)
    sync_directory(final.parent)
    if replaces:
        remove(replaced)


def recover(checkpoints: Path) -> None:
    """Put back, or remove, what a publish that was killed between its two renames had set aside."""
    try:
        entries = list(checkpoints.iterdir())
    except FileNotFoundError:
        return
    for entry in entries:
        if match := _REPLACED.fullmatch(entry.name):
            final = checkpoints / match[1]
            if final.exists():
                remove(entry)
            else:
                entry.rename(final)
                sync_directory(checkpoints)


def remove(path: Path) -> None:
    """Delete a checkpoint so that a kill in between leaves nothing that looks whole."""
    doomed = path.with_name(f"{path.name.split('.')[0]}.tmp")
    if doomed.exists():
        shutil.rmtree(doomed)
    path.rename(doomed)
    shutil.rmtree(doomed)


def retained(
    metas: Iterable[Meta], *, keep: int, keep_every: int = 0, keep_best: bool = False, metric: str = ""
) -> set[int]:
    """Return the steps to keep: the last `keep`, multiples of `keep_every`, and the best by `metric`.

    Of equal bests the earliest stays. A metric whose name ends in "loss" is better small, any other large;
    checkpoints without it, or where it is not finite, are not candidates.
    """
    by_step = sorted(metas, key=lambda m: m.step)
    kept = {m.step for m in by_step[-max(keep, 1) :]}
    if keep_every > 0:
        kept |= {m.step for m in by_step if m.step % keep_every == 0}
    scored = [(m.metrics[metric], m.step) for m in by_step if math.isfinite(m.metrics.get(metric, math.nan))]
    if keep_best and scored:
        sign = 1 if metric.endswith("loss") else -1
        kept.add(min((sign * value, step) for value, step in scored)[1])
    return kept


def retire(
    checkpoints: Path,
    newest: Path,
    *,
    keep: int,
    keep_every: int = 0,
    keep_best: bool = False,
    metric: str = "",
) -> list[Path]:
    """Delete the checkpoints that `retained` does not name; return them.

    `newest`, just published, always stays, and so does every directory without a readable manifest: what
    is wrong with it is said when somebody asks for it.
    """
    metas: dict[Path, Meta] = {}
    for path in list_checkpoints(checkpoints):
        try:
            metas[path] = read_manifest(path).meta
        except CheckpointError:
            continue
    kept = retained(metas.values(), keep=keep, keep_every=keep_every, keep_best=keep_best, metric=metric)
    gone = [path for path, meta in metas.items() if meta.step not in kept and path != newest]
    for path in gone:
        remove(path)
    return gone
