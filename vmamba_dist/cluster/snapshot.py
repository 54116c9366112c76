"""The code that a job runs: a copy in the run directory, so that editing the checkout changes nothing queued.

Law: a snapshot is named after its content, appears whole or not at all, and is never changed afterwards. Equal code is
kept once; a later submission with other code stands beside the earlier one's.

    RUN/code/3f2a9c41d0b7/                what git tracks, and what it does not ignore
    RUN/code/3f2a9c41d0b7/SNAPSHOT.json   commit, time, files, bytes
    RUN/code/3f2a9c41d0b7/SNAPSHOT.diff   what differs from that commit, new files aside: they are there
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import uuid
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import vmamba_dist
from vmamba_dist.config.schema import ConfigError

LIMIT_MIB = 64.0
RECORD = "SNAPSHOT.json"
DIFF = "SNAPSHOT.diff"


@dataclass(frozen=True)
class Origin:
    """Where a snapshot comes from."""

    source: str  # the checkout, or the folder of the installed packages
    commit: str | None  # None: not from a checkout
    changed: bool  # the checkout differed from that commit
    files: int
    bytes: int
    made: str  # UTC


def take(into: Path, *, limit_mib: float = LIMIT_MIB) -> Path:
    """Copy the running code below `into`, and return its folder. Raises ConfigError where it is too large."""
    root = Path(vmamba_dist.__file__).resolve().parent.parent
    if (root / ".git").exists() and shutil.which("git"):
        return take_checkout(root, into, limit_mib=limit_mib)
    # Found, not imported: the kernels load torch, which a submitter does not need.
    specs = [importlib.util.find_spec(name) for name in ("vmamba_dist", "vmamba_kernels")]
    packages = [Path(str(spec.origin)).resolve().parent for spec in specs if spec is not None]
    files = {
        Path(package.name) / path.relative_to(package): path
        for package in packages
        for path in sorted(package.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    return _copy(files, into, str(packages[0].parent), None, "", limit_mib)


def take_checkout(root: Path, into: Path, *, limit_mib: float = LIMIT_MIB) -> Path:
    """The same of a checkout: the files that git tracks, and those it does not ignore, as they are now."""
    listed = _git(root, "ls-files", "--cached", "--others", "--exclude-standard", "-z").split("\0")
    below = into.resolve()
    files = {
        Path(name): root / name
        for name in sorted(set(listed) - {""})
        # Deleted but not committed, or a repository inside: nothing to copy. A run in the checkout: not itself.
        if ((root / name).is_file() or (root / name).is_symlink())
        and not (root / name).absolute().is_relative_to(below)
    }
    commit = _git(root, "rev-parse", "--verify", "--quiet", "HEAD", may_fail=True).strip() or None
    diff = _git(root, "diff", "HEAD", "--binary") if commit else ""
    return _copy(files, into, str(root), commit, diff, limit_mib)


def _copy(
    files: dict[Path, Path], into: Path, source: str, commit: str | None, diff: str, limit_mib: float
) -> Path:
    sizes = {name: path.lstat().st_size for name, path in files.items()}
    total = sum(sizes.values())
    if total > limit_mib * 2**20:
        largest = sorted(sizes, key=lambda name: sizes[name], reverse=True)[:3]
        told = ", ".join(f"{name} ({sizes[name] / 2**20:.1f} MiB)" for name in largest)
        raise ConfigError(
            f"the code in {source} is {total / 2**20:.1f} MiB, a snapshot holds {limit_mib:g} MiB; the largest files: "
            f"{told}; name what is no code in .gitignore, or move it away"
        )
    into.mkdir(parents=True, exist_ok=True)
    beside = into / f".{uuid.uuid4().hex}.tmp"
    digest = hashlib.sha256()
    try:
        for name, path in files.items():
            target = beside / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target, follow_symlinks=False)
            content = os.fsencode(target.readlink()) if target.is_symlink() else target.read_bytes()
            digest.update(f"{name}\0{len(content)}\0".encode(errors="surrogateescape") + content)
        final = into / digest.hexdigest()[:12]
        origin = Origin(
            source,
            commit,
            _is_changed(files, diff, source, commit),
            len(files),
            total,
            datetime.now(UTC).isoformat(timespec="seconds"),
        )
        (beside / RECORD).write_text(json.dumps(asdict(origin), indent=1) + "\n", encoding="utf-8")
        (beside / DIFF).write_text(diff, encoding="utf-8", errors="surrogateescape")
        try:
            beside.rename(final)
        except OSError:
            if not (final / RECORD).is_file():  # else: the same code is there already
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return final


def _is_changed(files: dict[Path, Path], diff: str, source: str, commit: str | None) -> bool:
    if commit is None:
        return False
    tracked = set(_git(Path(source), "ls-files", "--cached", "-z").split("\0"))
    return diff != "" or any(str(name) not in tracked for name in files)


def _git(root: Path, *words: str, may_fail: bool = False) -> str:
    told = subprocess.run(
        ["git", "-C", str(root), *words],
        capture_output=True,
        check=False,
        env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
    )
    if told.returncode and not may_fail:
        said = told.stderr.decode(errors="replace").strip()
        raise ConfigError(f"git {words[0]} in {root}: {said}; a job needs a snapshot of the code")
    return told.stdout.decode(errors="surrogateescape")
