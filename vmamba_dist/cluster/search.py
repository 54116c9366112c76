"""`vmamba search`: hyper-parameters at random, or by successive halving, on the sweep.

Law: a trial is a function of (search.seed, its number, the key): more trials or keys change no earlier draw. Who goes
on from a rung is read from the trials' metrics, so a search that was killed goes on by the same command.

A rung is run.max_steps: a trial that goes on continues its own run, under the schedule of the whole, and repeats
nothing. Why no library: random draws are a hash and halving is a sort, and Optuna's storage would be a second truth
beside the run directories; its other samplers would need one.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from vmamba_dist.cluster import status
from vmamba_dist.cluster.follow import REQUEUE
from vmamba_dist.cluster.points import Point, check_key, plan, point, write
from vmamba_dist.cluster.submit import command_line
from vmamba_dist.cluster.sweep import PointResult, check_runs, run_points
from vmamba_dist.config import Config, ConfigError, digest, load, load_beside, to_dict, to_yaml

BEST = "best.yaml"
_SETTLED = ("finished", "failed")
_KINDS = ("log", "uniform", "int")


@dataclass(frozen=True)
class Search:
    """The group `search` of a config."""

    space: Mapping[
        str, Any
    ]  # config key → list of values | {log: [a, b]} | {uniform: [a, b]} | {int: [a, b]}
    trials: int = 16
    method: str = "random"  # random | halving
    rungs: tuple[int, ...] = ()  # halving: steps after which the trials are compared
    factor: int = 3  # halving: one in so many goes on
    metric: str = ""  # a key of metrics.jsonl; "": what eval.metric and eval.weights say
    seed: int = 0
    parallel: int = 1  # trials at a time

    def __post_init__(self) -> None:
        if not self.space:
            raise ConfigError(
                "search.space is empty: give for example search.space.optim.lr='{log: [1e-4, 1e-2]}'"
            )
        for name, least in (("trials", 1), ("factor", 2), ("parallel", 1), ("seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ConfigError(f"search.{name}={value!r}: use {least} or more")
        if self.method not in ("random", "halving"):
            raise ConfigError(f"search.method={self.method!r}: choose one of random, halving")
        rising = all(a < b for a, b in zip((0, *self.rungs), self.rungs, strict=False))
        if not all(type(rung) is int for rung in self.rungs) or not rising:
            raise ConfigError(f"search.rungs={list(self.rungs)}: steps, each more than the one before")
        if (self.method == "halving") != bool(self.rungs):
            raise ConfigError(
                f"search.rungs={list(self.rungs)} beside search.method={self.method}: halving compares at rungs, for "
                "example search.rungs=[100,300]; random has none"
            )
        for key, space in self.space.items():
            check_key(key, place="search.space.")
            _check_space(key, space)


@dataclass(frozen=True)
class Standing:
    """A trial as the search sees it."""

    result: PointResult
    rung: int | None  # steps of the last rung that it ran to; None: to the end
    score: float  # NaN where it has none

    def key(self, *, small: bool) -> tuple[float, float, str]:
        """Sorts the best first: who came further, then who scored better, then who was drawn first."""
        worst = math.isnan(self.score)
        score = math.inf if worst else self.score if small else -self.score
        return -(math.inf if self.rung is None else self.rung), score, self.result.point.name


def draw(search: Search) -> list[Point]:
    """The trials, t000 first."""
    width = max(3, len(str(search.trials - 1)))
    return [
        point(
            {key: _draw(space, _uniform(search.seed, trial, key)) for key, space in search.space.items()},
            name=f"t{trial:0{width}}",
        )
        for trial in range(search.trials)
    ]


def go_on(standings: Sequence[Standing], factor: int, *, small: bool) -> list[str]:
    """Who goes on: the best one in `factor`, at least one; nobody without a score."""
    ranked = sorted((s for s in standings if not math.isnan(s.score)), key=lambda s: s.key(small=small))
    return [s.result.point.name for s in ranked[: math.ceil(len(standings) / factor)]]


def score(run: Path, metric: str, rung: int | None) -> float:
    """The metric where the run had come to the rung, or to its end; NaN where it was not measured there."""
    lines = (
        [line for line in status.metrics(run) if rung is None or line["step"] <= rung] if run.is_dir() else []
    )
    value = lines[-1].get(metric) if lines else None
    return math.nan if value is None else float(value)


def read_words(words: Sequence[str]) -> tuple[Search, Config]:
    """The search and the config of its runs, of a command line. Raises ConfigError."""
    base, said = load_beside(words, "search")
    space = {key.removeprefix("space."): said.pop(key) for key in list(said) if key.startswith("space.")}
    for key in space:  # a range of a key that no config has was taken for a group
        check_key(key.removesuffix(f".{_kind(key)}"), place="search.space.")
    known = {item.name for item in fields(Search)} - {"space"}
    for key in said:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean search.{near[0]}?" if near else f"there are {', '.join(sorted(known))}"
            raise ConfigError(f"search.{key}={said[key]!r}: no such key; {hint}")
    rungs = said.pop("rungs", [])
    if not isinstance(rungs, list):
        raise ConfigError(f"search.rungs={rungs!r}: give a list of steps, for example search.rungs=[100,300]")
    search = Search(space=space, rungs=tuple(rungs), **said)
    last = base.run.max_steps
    if search.rungs and last is not None and search.rungs[-1] >= last:
        raise ConfigError(f"search.rungs={rungs}: the last is not before the end, run.max_steps={last}")
    weights = base.eval.weights if base.ema.enabled else "raw"
    return replace(search, metric=search.metric or f"eval/{weights}/{base.eval.metric}"), base


def _kind(key: str) -> str:
    return next((kind for kind in _KINDS if key.endswith(f".{kind}")), "")


def main(words: Sequence[str]) -> int:
    """Search; return 0 with a best trial found, 1 where no trial has a score, 75 where it was stopped."""
    dry = "--dry-run" in words
    words = [word for word in words if word != "--dry-run"]
    search, base = read_words(words)
    folder = Path(base.run.dir)
    trials = _distinct(draw(search), base)
    planned = plan(trials, base, folder)
    if dry:
        print(status.table([("trial", "config"), *((each.name, " ".join(each.words)) for each in trials)]))
        print(f"\n{_in_words(search, len(trials), base)}, below {folder}")
        return 0
    check_runs(planned)
    print(_in_words(search, len(trials), base), flush=True)
    small = search.metric.endswith("loss")
    command = command_line("search", words)
    out: list[Standing] = []
    for rung in (*search.rungs, None):
        results = run_points(
            [replace(each, words=(*each.words, *_until(rung))) for each in trials],
            base=base,
            folder=folder,
            parallel=search.parallel,
            command=command,
            beside=[standing.result for standing in out],
        )
        if any(result.state not in _SETTLED for result in results):
            return REQUEUE
        standings = [_standing(result, search.metric, rung) for result in results]
        if rung is None:
            return _conclude([*standings, *out], search, base, folder)
        names = go_on(standings, search.factor, small=small)
        print(f"step {rung}: {len(names)} of {len(trials)} go on: {', '.join(names)}", flush=True)
        out += [standing for standing in standings if standing.result.point.name not in names]
        trials = [each for each in trials if each.name in names]
        if not trials:
            return _conclude(out, search, base, folder)
    raise AssertionError("the last rung is the end")


def _standing(result: PointResult, metric: str, rung: int | None) -> Standing:
    found = score(result.run, metric, rung) if result.state == "finished" else math.nan
    return Standing(result, rung, found)


def _until(rung: int | None) -> tuple[str, ...]:
    return () if rung is None else (f"run.max_steps={rung}",)


def _conclude(standings: Sequence[Standing], search: Search, base: Config, folder: Path) -> int:
    """Print the table, best first, and write the best trial's config."""
    small = search.metric.endswith("loss")
    ranked = sorted(standings, key=lambda s: s.key(small=small))
    rows = [("trial", "steps", search.metric, "state", "config", "why")]
    for each in ranked:
        words = " ".join(word for word in each.result.point.words if not word.startswith("run.max_steps="))
        told = "" if math.isnan(each.score) else f"{each.score:.4f}"
        result = each.result
        rows.append((result.point.name, str(result.record.step), told, result.state, words, result.reason))
    print(f"\n{status.table(rows)}")
    best = ranked[0]
    if math.isnan(best.score):
        print(f"\nno trial has come to a value of {search.metric}; {folder / 'results.csv'} says why")
        return 1
    config = best.result.planned.config
    config = replace(config, run=replace(config.run, max_steps=base.run.max_steps))
    write(folder / BEST, to_yaml(config))
    print(f"\nbest     {best.result.point.name}, {search.metric} {best.score:.4f}")
    print(f"config   {folder / BEST}\nresults  {folder / 'results.csv'}")
    return 0


def _distinct(trials: Sequence[Point], base: Config) -> list[Point]:
    """The trials without repetitions: lists of few values are soon drawn twice."""
    found: dict[str, Point] = {}
    for each in trials:
        found.setdefault(digest(to_dict(load(each.words, base=to_dict(base)))), each)
    if len(found) < len(trials):
        print(f"{len(trials) - len(found)} of {len(trials)} trials repeat earlier ones and are left out")
    return list(found.values())


def _in_words(search: Search, count: int, base: Config) -> str:
    end = f"step {base.run.max_steps}" if base.run.max_steps else "the end"
    if search.method == "random":
        return f"{count} trials to {end}, {search.parallel} at a time"
    sizes = [count]
    for _ in search.rungs:
        sizes.append(math.ceil(sizes[-1] / search.factor))
    steps = [f"{n} to step {rung}" for n, rung in zip(sizes, search.rungs, strict=False)]
    return f"{', '.join([*steps, f'{sizes[-1]} to {end}'])}, {search.parallel} at a time"


def _check_space(key: str, space: Any) -> None:
    place = f"search.space.{key}={json.dumps(space)}"
    if isinstance(space, list):
        if not space:
            raise ConfigError(f"{place}: an empty list has nothing to draw")
        return
    if not isinstance(space, Mapping) or len(space) != 1 or not set(space) <= set(_KINDS):
        raise ConfigError(
            f"{place}: give a list of values, or a range as {{log: [1e-4, 1e-2]}}, uniform or int"
        )
    ((kind, ends),) = space.items()
    numbers = int if kind == "int" else (int, float)
    if not isinstance(ends, list) or len(ends) != 2 or not all(isinstance(end, numbers) for end in ends):
        raise ConfigError(
            f"{place}: {kind} needs two {'whole ' if kind == 'int' else ''}numbers, from and to"
        )
    low, high = ends
    if not low < high or (kind == "log" and low <= 0):
        raise ConfigError(f"{place}: use {'0 < ' if kind == 'log' else ''}from < to")


def _uniform(seed: int, trial: int, key: str) -> float:
    """In [0, 1), from (seed, trial, key) alone."""
    raw = hashlib.blake2b(f"{seed}/{trial}/{key}".encode(), digest_size=8).digest()
    return int.from_bytes(raw) / 2**64


def _draw(space: Any, u: float) -> Any:
    if isinstance(space, list):
        return space[int(u * len(space))]
    ((kind, (low, high)),) = space.items()
    if kind == "int":
        return low + int(u * (high - low + 1))
    value = low * (high / low) ** u if kind == "log" else low + u * (high - low)
    return float(f"{value:.4g}")  # that many digits say enough, and can be read
