"""`vmamba checkpoints`: what a run has saved, and whether it is whole.

Law: a run may be saving and deleting meanwhile. What is still being written is told as that, and what was deleted
while it was looked at is no damage.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from vmamba_dist.checkpoint.store import (
    MANIFEST,
    CheckpointError,
    list_checkpoints,
    list_unfinished,
    read_manifest,
    step_of,
    verify_checkpoint,
)
from vmamba_dist.config.schema import ConfigError


def main(words: Sequence[str]) -> int:
    """Run one checkpoints command; 1 where a checkpoint is damaged."""
    parser = argparse.ArgumentParser(prog="vmamba checkpoints", description="What a run has saved.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name, text in {
        "list": "one line a checkpoint; looks at manifests only",
        "verify": "read every byte and compare with the manifests",
        "show": "everything a manifest says",
    }.items():
        verbs.add_parser(name, help=text).add_argument(
            "path", help="a run directory or one checkpoint", type=Path
        )
    given = parser.parse_args(words)
    found = _checkpoints(given.path)
    status = {"list": _list, "verify": _verify, "show": _show}[given.verb](found)
    if given.verb == "list" and given.path not in found:
        for path in list_unfinished(found[0].parent):
            print(f"{path.name}  unfinished: being written or deleted, or left by a kill")
    return status


def _checkpoints(path: Path) -> list[Path]:
    """The checkpoints that `path` means, oldest first. Raises ConfigError where there is none."""
    if step_of(path) is not None or (path / MANIFEST).exists():
        found = [path] if path.is_dir() else []
    else:
        found = list_checkpoints(path / "checkpoints") or list_checkpoints(path)
    if not found:
        begun = list_unfinished(path / "checkpoints") or list_unfinished(path)
        hint = f" but {begun[0].name}, which is not finished" if begun else ""
        raise ConfigError(f"{path}: no checkpoint there{hint}; name a run directory or a step-… folder")
    return found


def _list(found: Sequence[Path]) -> int:
    damaged = 0
    for path in found:
        try:
            manifest = read_manifest(path)
        except CheckpointError as error:
            if path.exists():
                damaged += 1
                print(f"{path.name}  DAMAGED  {error}")
            continue
        meta = manifest.meta
        mib = sum(record.bytes for record in manifest.files.values()) / 2**20
        metrics = "  ".join(f"{key} {value:.4g}" for key, value in meta.metrics.items())
        print(
            f"{path.name}  epoch {meta.epoch}  {meta.engine} × {meta.world_size}  {mib:.1f} MiB  {metrics}".rstrip()
        )
    return 1 if damaged else 0


def _verify(found: Sequence[Path]) -> int:
    damaged = 0
    for path in found:
        faults = verify_checkpoint(path)
        if faults and not path.exists():
            print(f"{path.name}  deleted meanwhile: the run keeps newer ones")
            continue
        damaged += bool(faults)
        print(f"{path.name}  {'; '.join(map(str, faults)) or 'whole'}")
    return 1 if damaged else 0


def _show(found: Sequence[Path]) -> int:
    newest = found[-1]
    manifest = read_manifest(newest)
    meta = manifest.meta
    rows = {
        "checkpoint": newest,
        "step": meta.step,
        "samples": meta.samples,
        "epoch": meta.epoch,
        "written by": f"{meta.engine} on {meta.world_size} processes",
        "config": meta.config_digest,
        "state": meta.state,
    }
    for key, value in rows.items():
        print(f"{key:<11} {value}")
    for title, values in (("metrics", meta.metrics), ("trajectory", meta.trajectory), ("extra", meta.extra)):
        for key, value in values.items():
            print(f"{title:<11} {key}={value}")
    for name, record in manifest.files.items():
        print(f"{'file':<11} {name}  {record.bytes} bytes  sha256 {record.sha256[:12]}…")
    return 0
