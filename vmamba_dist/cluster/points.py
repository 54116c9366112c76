"""The points of a sweep: a grid over config keys, or the rows of a CSV, each with a name and a checked config.

Law: pure. Every point is checked before the first one starts, and no two are the same run or share a directory.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from vmamba_dist.config import Config, ConfigError, digest, known_keys, load, nearest_key, to_dict
from vmamba_dist.models.variants import configured

RECORDS = "points"  # a sweep's own folder, beside its run directories
_TAKEN = (RECORDS, "slurm", "code", ".", "..")
_MOST = 120  # characters of a directory's name
_NOT_SWEPT = {
    "run.dir": "each point has a directory of its own below it",
    "run.allow_changes": "say it once, for all points",
}


@dataclass(frozen=True)
class Branch:
    """A point begins in another one's checkpoint, of a step that its schedule has come to in the same way."""

    of: str  # name of that point
    step: int


@dataclass(frozen=True)
class Point:
    """One run of a sweep: its directory's name, and what its config says over the sweep's own."""

    name: str
    words: tuple[str, ...]  # key=value
    branch: Branch | None = None


@dataclass(frozen=True)
class Planned:
    """A point and all that its run is told."""

    point: Point
    config: Config

    @property
    def run(self) -> Path:
        return Path(self.config.run.dir)


@dataclass(frozen=True)
class Sweep:
    """What is to be run, where, and how much of it at a time."""

    folder: Path
    planned: Sequence[Planned]
    parallel: int
    command: str  # that goes on with it

    def file(self, one: Planned, ending: str) -> Path:
        """The point's config (.yaml), output (.log), end (.json) or place in Slurm's queue (.job)."""
        return self.folder / RECORDS / f"{one.point.name}.{ending}"


def write(path: Path, text: str) -> None:
    """Replace a file in one step: a kill leaves the old one or the new one."""
    beside = path.with_name(f"{path.name}.tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def grid(axes: Mapping[str, Sequence[Any]]) -> list[Point]:
    """Every combination of the axes' values, the last axis fastest. Raises ConfigError naming the axis."""
    for key, values in axes.items():
        check_key(key)
        if not isinstance(values, Sequence) or isinstance(values, str):
            raise ConfigError(f"sweep.{key}={values!r}: give a list of values, for example sweep.{key}=[…]")
        if not values:
            raise ConfigError(
                f"sweep.{key}=[]: an empty list has no point; give values, or leave the key out"
            )
    return [point(dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]


def from_csv(path: Path) -> list[Point]:
    """A point a row; columns are config keys, and `name` if you like. An empty cell leaves the key alone."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            header, *rows = [[cell.strip() for cell in row] for row in csv.reader(file) if any(row)] or [[]]
    except OSError as error:
        raise ConfigError(f"sweep.points={path}: {error.strerror}") from error
    for key in header:
        if key != "name":
            check_key(key, place=f"{path}, column ")
    if len(set(header)) < len(header):
        raise ConfigError(f"sweep.points={path}: a column twice among {', '.join(header)}")
    if not rows:
        raise ConfigError(f"sweep.points={path}: no points; write a line of keys, then a line a point")
    points = []
    for number, row in enumerate(rows, 1):
        if len(row) != len(header):
            raise ConfigError(
                f"sweep.points={path}: point {number} has {len(row)} cells for {len(header)} keys"
            )
        cells = {key: cell for key, cell in zip(header, row, strict=True) if cell}
        name = cells.pop("name", "")
        points.append(point({key: _read(key, cell, cell) for key, cell in cells.items()}, name=name))
    return points


def point(values: Mapping[str, Any], *, name: str = "") -> Point:
    """The point of some keys' values, called after them unless it has a name."""
    words = tuple(f"{key}={_text(key, value)}" for key, value in values.items())
    return Point(name or _name(values), words)


def check_key(key: str, *, place: str = "sweep.") -> None:
    """Refuse a key that no config has, or that cannot differ between points."""
    if key not in known_keys():
        raise ConfigError(f"{place}{key}: no such key; {nearest_key(key) or 'see config/schema.py'}")
    if key in _NOT_SWEPT:
        raise ConfigError(f"{place}{key}: not a key to sweep: {_NOT_SWEPT[key]}")
    if key.startswith("launch."):
        raise ConfigError(f"{place}{key}: not a key to sweep: all points are launched alike; set {key} once")


def plan(points: Sequence[Point], base: Config, folder: Path) -> list[Planned]:
    """Build and check every point's config, its run directory below `folder`. Raises ConfigError naming points."""
    if not points:
        raise ConfigError("no points: name what to sweep, for example sweep.optim.lr=[1e-3,2e-3]")
    for each in points:
        _check_name(each)
    planned = [Planned(each, _config(each, base, folder)) for each in points]
    seen: dict[str, Point] = {}
    taken: dict[str, Point] = {}
    for one in planned:
        alone = replace(one.config, run=replace(one.config.run, dir=str(folder)))
        same = seen.setdefault(digest(to_dict(alone)), one.point)
        if same is not one.point:
            raise ConfigError(
                f"the points {same.name} and {one.point.name} are the same run; leave one of them out"
            )
        other = taken.setdefault(one.point.name, one.point)
        if other is not one.point:
            raise ConfigError(
                f"two points would share the directory {one.run}: {' '.join(other.words) or 'the base'} "
                f"and {' '.join(one.point.words) or 'the base'}; name them apart in a column `name` of sweep.points"
            )
    for each in points:
        _check_branch(each, taken)
    return planned


def checkpoint_of(folder: Path, branch: Branch) -> Path:
    """Where a branch begins."""
    return folder / branch.of / "checkpoints" / f"step-{branch.step:09d}"


def _config(each: Point, base: Config, folder: Path) -> Config:
    try:
        config = load(each.words, base=to_dict(base))
        configured(config.model)
    except ValueError as error:  # a ConfigError is one
        raise ConfigError(f"point {each.name}: {error}") from error
    resume = str(checkpoint_of(folder, each.branch)) if each.branch else config.run.resume
    return replace(config, run=replace(config.run, dir=str(folder / each.name), resume=resume))


def _check_name(each: Point) -> None:
    if each.name in _TAKEN or re.search(r"[/\0\n]", each.name) or not each.name:
        raise ConfigError(
            f"a point cannot be called {each.name!r}: its name is a folder's, and {', '.join(_TAKEN)} are taken"
        )


def _check_branch(each: Point, points: Mapping[str, Point]) -> None:
    at, passed = each, [each.name]
    while at.branch is not None:
        if at.branch.of not in points:
            raise ConfigError(
                f"point {at.name} branches from {at.branch.of}, which is no point of this sweep"
            )
        at = points[at.branch.of]
        if at.name in passed:
            raise ConfigError(f"points that begin in each other's checkpoints: {', '.join(passed)}")
        passed.append(at.name)


def _name(values: Mapping[str, Any]) -> str:
    """lr=0.001,name=vmamba_atto: keys by their last part where that tells them apart."""
    short = [key.rpartition(".")[2] for key in values]
    labels = {key: key if short.count(end) > 1 else end for key, end in zip(values, short, strict=True)}
    name = ",".join(f"{labels[key]}={_slug(value)}" for key, value in values.items())
    if len(name) > _MOST:
        name = f"{name[: _MOST - 9]}~{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name or "base"


def _slug(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
    return re.sub(r"[^\w.+-]+", "_", text)


def _text(key: str, value: Any) -> str:
    """The value as a word that reads back as the same value."""
    if isinstance(value, str):
        return value if _read(key, value, None) == value else json.dumps(value)
    return json.dumps(value)


def _read(key: str, text: str, otherwise: Any) -> Any:
    """What key=text means, `otherwise` where that is no YAML."""
    try:
        found = OmegaConf.select(OmegaConf.from_dotlist([f"{key}={text}"]), key)
    except (OmegaConfBaseException, YAMLError):
        return otherwise
    return OmegaConf.to_container(found) if OmegaConf.is_config(found) else found
