"""A scaling study as plain data: which models learn from how many samples, in which order, at what cost.

Law: a study is a function of its config alone, and a point is an ordinary run: the study's own words and the point's
after them are the words of `vmamba train`. C, the training FLOPs of a run, is 6 × multiply-adds of a forward × samples
(a multiply-add is 2 operations, a backward 2 forwards), as `flops.train_flops_per_image` counts it; N is parameters
without the classifier. No torch.

For whoever runs the points:

    study = plan_study(load(words))
    run every point of study.search                 # none where there is no search
    lrs = choose_lrs(study, {name: loss, …})        # of the search's runs that ended
    run every point of study.grid(lrs)              # longest budgets first: others branch from their checkpoints
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

from vmamba_dist.config.schema import Config, ConfigError, ModelConfig
from vmamba_dist.core.gpus import gpu_named
from vmamba_dist.models import flops
from vmamba_dist.models.variants import Variant, configured
from vmamba_dist.optim.schedule import build_schedule
from vmamba_dist.scaling.cost import Place, cost
from vmamba_dist.scaling.memory import Job, largest_micro_batch, memory, way_out

PARAMETERS = 5  # of the law: E, A, B, alpha, beta
BASE_WIDTH = 128  # vmamba_base's: from here up a rule's widths are multiples of 64
CLASSES = 1000  # where neither the config nor an index on this machine says it
_PER_HOUR = 3600.0
_FINER = 1.02  # steps in which the highest level of compute is sought

Phase = Literal["search", "grid"]


@dataclass(frozen=True)
class Rung:
    """One model of the ladder, and what its size decides."""

    label: str
    model: ModelConfig
    params: int  # without the classifier
    macs: int  # of one sample's forward, with the classifier
    batch: int  # samples an update
    held_out: bool
    hours: float | None  # device-hours a sample; None: unknown
    words: tuple[str, ...]

    @property
    def flops(self) -> int:
        """Training FLOPs a sample."""
        return 6 * self.macs


@dataclass(frozen=True)
class Branch:
    """A checkpoint of another point, from the constant phase of its schedule, that a point may start from."""

    point: str
    step: int
    samples: int

    def word(self, study_dir: str) -> str:
        """The key=value that makes a run start there."""
        return f"run.resume={Path(study_dir) / self.point / 'checkpoints' / f'step-{self.step:09d}'}"


@dataclass(frozen=True)
class Point:
    """One run of a study. `words` go after the study's own."""

    name: str
    phase: Phase
    rung: Rung
    samples: int
    seed: int
    level: float | None  # FLOPs of its IsoFLOP level; None in a grid of samples
    branch_from: Branch | None
    words: tuple[str, ...]

    @property
    def new_samples(self) -> int:
        """Samples that it learns from itself, where it branches."""
        return self.samples - (self.branch_from.samples if self.branch_from else 0)

    @property
    def flops(self) -> float:
        """Training FLOPs that the model has seen at the end."""
        return float(self.rung.flops * self.samples)

    @property
    def cost_flops(self) -> float:
        """Training FLOPs that it costs, where it branches."""
        return float(self.rung.flops * self.new_samples)

    @property
    def cost_hours(self) -> float | None:
        """Device-hours that it costs; None where unknown."""
        return None if self.rung.hours is None else self.rung.hours * self.new_samples


@dataclass(frozen=True)
class Study:
    """A planned study. Points of the grid have no learning rate before it is chosen: see `grid`."""

    cfg: Config
    classes: int
    rungs: tuple[Rung, ...]  # smallest first
    levels: tuple[float, ...]  # FLOPs; empty in a grid of samples
    search: tuple[Point, ...]
    planned: tuple[Point, ...]  # of the grid, without optim.lr

    def grid(self, lrs: Mapping[str, float]) -> tuple[Point, ...]:
        """The grid's points, with the learning rate of each rung, by label."""
        return tuple(
            replace(point, words=(*point.words, f"optim.lr={lrs[point.rung.label]:.6g}"))
            for point in self.planned
        )

    @property
    def points(self) -> tuple[Point, ...]:
        return (*self.search, *self.planned)


@dataclass(frozen=True)
class Choice:
    """A rung's learning rate and where it comes from."""

    lr: float
    how: str


def plan_study(cfg: Config) -> Study:
    """Lay out a study. Raises ConfigError where it is empty, costs more than allowed, or cannot be fitted."""
    rungs = _rungs(cfg)
    classes = classes_of(cfg)
    study = cfg.study
    if not (study.samples or study.flops or study.levels):
        raise ConfigError("study.samples, study.flops and study.levels are all unset: set one of them")
    if study.levels:
        levels = _affordable(cfg, rungs)
    else:
        levels = tuple(sorted(study.flops))
    planned = _grid(cfg, rungs, levels)
    _check_points(cfg, planned, levels)
    search = _search(cfg, _present(rungs, planned), planned)
    found = Study(cfg, classes, rungs, levels, search, planned)
    _check_total(found)
    return found


def choose_lrs(study: Study, losses: Mapping[str, float]) -> dict[str, Choice]:
    """Choose each rung's learning rate from the losses of the search's runs, by point name.

    Searched: the lowest point of the parabola in log lr through the best run and its neighbours. Others: a power law of
    the parameters through the searched ones, kept within what was tried. Without a search: study.lr_power. Raises
    ConfigError where a searched rung has no finite loss at all.
    """
    cfg, smallest = study.cfg, study.rungs[0]
    chosen: dict[str, Choice] = {}
    if not study.search:
        for rung in study.rungs:
            lr = cfg.optim.lr * (rung.params / smallest.params) ** cfg.study.lr_power
            chosen[rung.label] = Choice(lr, "rule")
        return chosen
    tried = sorted(cfg.study.lrs)
    searched = {point.rung.label: point.rung for point in study.search}
    for label in searched:
        found = [
            (lr, loss) for lr in tried if math.isfinite(loss := losses.get(_search_name(label, lr), math.nan))
        ]
        if not found:
            raise ConfigError(
                f"the search of {label} has no run that ended with a finite loss: run `vmamba study run` again, "
                "or set lower study.lrs"
            )
        chosen[label] = _lowest(found, tried)
    logs = [(math.log(rung.params), math.log(chosen[label].lr)) for label, rung in searched.items()]
    slope = _slope(logs) if len(logs) > 1 else cfg.study.lr_power
    centre = [sum(values) / len(logs) for values in zip(*logs, strict=True)]
    for rung in study.rungs:
        if rung.label not in chosen:
            wanted = math.exp(centre[1] + slope * (math.log(rung.params) - centre[0]))
            lr = min(max(wanted, tried[0]), tried[-1])
            cut = "" if math.isclose(lr, wanted) else f" gives {wanted:.3g}, cut to what was tried"
            chosen[rung.label] = Choice(lr, f"transferred: ∝ params^{slope:.2f}{cut}")
    return chosen


def _lowest(found: Sequence[tuple[float, float]], tried: Sequence[float]) -> Choice:
    best = min(range(len(found)), key=lambda i: found[i][1])
    lr = found[best][0]
    if lr in (tried[0], tried[-1]) and len(tried) > 1:
        return Choice(lr, "search: at the edge of study.lrs")
    if not 0 < best < len(found) - 1:
        return Choice(lr, "search: best run; a neighbour did not end")
    (x0, y0), (x1, y1), (x2, y2) = ((math.log(x), y) for x, y in found[best - 1 : best + 2])
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    if right - left <= 0:  # three equal losses
        return Choice(lr, "search: best run")
    # The parabola's slope is `left` midway between the first two and `right` midway between the others.
    lowest = (x0 + x1) / 2 - left * (x2 - x0) / 2 / (right - left)
    return Choice(math.exp(min(max(lowest, x0), x2)), "search: parabola")


def _slope(logs: Sequence[tuple[float, float]]) -> float:
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    across = sum((x - mean_x) * (x - mean_x) for x, _ in logs)
    along = sum((x - mean_x) * (y - mean_y) for x, y in logs)
    return float(along / across)


# The ladder


def _rungs(cfg: Config) -> tuple[Rung, ...]:
    """Every rung, the smallest first. Raises ConfigError where two are the same size."""
    models = [(name, replace(cfg.model, name=name)) for name in cfg.study.models]
    models += list(_by_rule(cfg))
    if not models:
        raise ConfigError(
            "study.models, study.widths and study.sizes are all unset: a ladder needs two models"
        )
    side = cfg.data.image_size
    classes = classes_of(cfg)
    sized = []
    for label, model in models:
        variant = configured(model)
        try:
            macs = flops.macs(variant, side, side, classes)
        except ValueError as error:
            raise ConfigError(f"data.image_size={side}: {error}") from error
        sized.append((flops.params(variant, 0), macs, label, model))
    sized.sort(key=lambda row: row[0])
    for one, other in pairwise(sized):
        if one[0] == other[0]:
            raise ConfigError(
                f"{one[2]} and {other[2]} are of one size, {one[0]} parameters: take one of them off the ladder"
            )
    held_from = len(sized) - cfg.study.held_out
    return tuple(
        _rung(cfg, label, model, params, macs, sized[0][0], held_out=i >= held_from)
        for i, (params, macs, label, model) in enumerate(sized)
    )


def _rung(
    cfg: Config, label: str, model: ModelConfig, params: int, macs: int, smallest: int, *, held_out: bool
) -> Rung:
    batch = cfg.data.global_batch
    if cfg.study.batch_power:
        # A multiple of the smallest model's: it divides over the same ranks.
        batch *= max(1, round((params / smallest) ** cfg.study.batch_power))
    words = [f"model.name={model.name}"]
    if model.width is not None:
        words += [f"model.width={model.width}"]
    if model.depths is not None:
        words += [f"model.depths=[{','.join(map(str, model.depths))}]"]
    words += [f"data.global_batch={batch}"]
    hours = _hours(cfg, model, macs, batch)
    return Rung(label, model, params, macs, batch, held_out, hours, tuple(words))


def _by_rule(cfg: Config) -> Iterator[tuple[str, ModelConfig]]:
    """Rungs that are no named models: model.name at other widths, and as deep as study.depth_power says."""
    study, model = cfg.study, cfg.model
    widths = list(study.widths)
    if study.sizes:
        widths += rule_widths(study.width_from, study.width_to, study.sizes)
    if len(set(widths)) < len(widths):
        raise ConfigError(
            f"study.sizes={study.sizes}: widths {study.width_from} … {study.width_to} in multiples of 16, from "
            f"{BASE_WIDTH} up of 64, give {', '.join(map(str, widths))}: use fewer sizes or a wider range"
        )
    for width in sorted(widths):
        base = configured(replace(model, width=width))
        yield (
            f"{model.name}-w{width}",
            replace(model, width=width, depths=_deepened(base, width, widths, study.depth_power, model)),
        )


def rule_widths(first: int, last: int, count: int) -> list[int]:
    """So many first-stage widths in equal ratios, multiples of 16 below Base's width and of 64 from there up."""
    ratio = (last / first) ** (1 / (count - 1))
    return [round_width(first * ratio**i) for i in range(count)]


def round_width(width: float) -> int:
    """The nearest first-stage width that the rule allows."""
    fine = max(16, 16 * round(width / 16))
    return fine if fine < BASE_WIDTH else max(BASE_WIDTH, 64 * round(width / 64))


def _deepened(
    base: Variant, width: int, widths: Sequence[int], power: float, model: ModelConfig
) -> tuple[int, int, int, int] | None:
    if not power:
        return model.depths
    first, second, third, last = base.depths
    return first, second, max(1, round(third * (width / min(widths)) ** power)), last


def classes_of(cfg: Config) -> int:
    """model.num_classes, else what the shards' index on this machine says, else ImageNet-1k's."""
    if cfg.model.num_classes is not None:
        return cfg.model.num_classes
    train = cfg.data.train if isinstance(cfg.data.train, str) else ""  # a mixture has no one index
    info = Path(train) / "_info.json"
    if not train or not info.is_file():
        return CLASSES
    try:
        read = json.loads(info.read_text(encoding="utf-8"))
        return int(read.get("num_classes", len(read.get("classes", ())))) or CLASSES  # timm's say neither
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"data.train={cfg.data.train!r}: {info} cannot be read ({error!r})") from error


def _hours(cfg: Config, model: ModelConfig, macs: int, batch: int) -> float | None:
    """Device-hours a sample, by `vmamba plan`'s model of a GPU or by a stated rate."""
    study = cfg.study
    if study.gpu:
        return gpu_hours_per_sample(replace(cfg, model=model), batch, study.gpu, study.gpus, classes_of(cfg))
    if study.device_gflops:
        return 6 * macs / (1e9 * study.device_gflops) / _PER_HOUR
    return None


def gpu_hours_per_sample(cfg: Config, batch: int, gpu: str, gpus: int, classes: int) -> float:
    """GPU-hours that a sample of a training run takes on GPUs of a kind, by `vmamba plan`'s model.

    Raises ConfigError where the model does not fit or the batch does not divide.
    """
    if cfg.precision.compute != "bfloat16":
        raise ConfigError(
            f"precision.compute={cfg.precision.compute}: rates of GPUs are known in bfloat16; use that, "
            "or leave study.gpu empty"
        )
    cfg = replace(cfg, data=replace(cfg.data, global_batch=batch))
    job = Job(cfg, gpus, gpu_named(gpu), classes)
    policy = cfg.parallel.recompute
    held = memory(job, policy, job.micro_batch)
    micro_batch = job.micro_batch if held.fits else largest_micro_batch(job, policy)
    if micro_batch is None:
        raise ConfigError(f"model.name={cfg.model.name} does not fit {gpus} × {gpu}; use {way_out(job)}")
    place = Place(cfg.launch.gpus_per_node or 8, 50.0)
    return gpus * cost(job, policy, micro_batch, place).step / batch / _PER_HOUR


# The points


def _grid(cfg: Config, rungs: Sequence[Rung], levels: Sequence[float]) -> tuple[Point, ...]:
    """Every point of the grid: per rung and seed, the longest first."""
    points: list[Point] = []
    for rung in rungs:
        budgets = _budgets(cfg, rung, levels)
        for seed in range(cfg.run.seed, cfg.run.seed + cfg.study.seeds):
            points += _one_seed(cfg, rung, budgets, seed)
    return tuple(points)


def _budgets(cfg: Config, rung: Rung, levels: Sequence[float]) -> list[tuple[int, float | None]]:
    """(samples in whole steps, level) of a rung, the longest first."""
    study = cfg.study
    wanted: list[tuple[float, float | None]] = [(float(n), None) for n in study.samples]
    for level in levels:
        count = level / rung.flops
        if max(study.min_samples, rung.batch) <= count <= study.max_samples:
            wanted.append((count, level))
    # Levels that lie closer than a step come to one budget.
    whole = {max(1, round(count / rung.batch)) * rung.batch: level for count, level in wanted}
    return sorted(whole.items(), reverse=True)


def _one_seed(
    cfg: Config, rung: Rung, budgets: Sequence[tuple[int, float | None]], seed: int
) -> Iterator[Point]:
    if not budgets:
        return
    batch = rung.batch
    warmup, every = _rhythm(cfg, batch, [count for count, _ in budgets])
    branches = cfg.schedule.kind == "wsd" and cfg.study.branch and len(budgets) > 1 and every > 0
    trunk = _name(rung, budgets[0][0], seed)
    for count, level in budgets:
        name = _name(rung, count, seed)
        words = [
            *_common(cfg, rung, name, count, seed),
            f"schedule.warmup_samples={warmup}",
        ]
        branch = None
        if branches and name == trunk:
            words += [f"checkpoint.every_steps={every}", f"checkpoint.keep_every={every}"]
        elif branches:
            step = _decays_from(cfg, batch, count, warmup) // (every * batch) * every
            branch = Branch(trunk, step, step * batch)
        yield Point(name, "grid", rung, count, seed, level, branch, tuple(words))


def _rhythm(cfg: Config, batch: int, counts: Sequence[int]) -> tuple[int, int]:
    """Warm-up in samples, that of the shortest budget for all, and steps between the checkpoints to branch from."""
    shortest = min(counts)
    warmup = cfg.schedule.warmup_samples
    if warmup is None:
        warmup = round(cfg.schedule.warmup * shortest)
    # A little less than the shortest's constant phase: budgets are rounded to steps, their multiples must not miss it.
    return warmup, int(0.99 * _decays_from(cfg, batch, shortest, warmup)) // batch


def _decays_from(cfg: Config, batch: int, count: int, warmup: int) -> int:
    schedule = replace(cfg.schedule, warmup_samples=warmup, samples=count)
    return build_schedule(schedule, cfg.optim, global_batch=batch, total_samples=count).decays_from


def _common(cfg: Config, rung: Rung, name: str, count: int, seed: int) -> list[str]:
    return [
        f"run.dir={Path(cfg.run.dir) / name}",
        f"run.seed={seed}",
        *rung.words,
        f"schedule.samples={count}",
        f"launch.name={name}",
    ]


def _name(rung: Rung, count: int, seed: int) -> str:
    return f"{rung.label}-{count}-s{seed}"


def _search(cfg: Config, rungs: Sequence[Rung], planned: Sequence[Point]) -> tuple[Point, ...]:
    """The runs of the learning-rate search: each value at each of the rungs that are searched, one seed, one budget."""
    study = cfg.study
    if not study.lrs:
        return ()
    fitted = [rung for rung in rungs if not rung.held_out]
    searched = fitted[: study.search_sizes or len(fitted)]
    if study.search_held_out:
        searched += [rung for rung in rungs if rung.held_out]
    points = []
    for rung in searched:
        budget = study.search_samples or min(p.samples for p in planned if p.rung == rung)
        count = max(1, round(budget / rung.batch)) * rung.batch
        warmup, _ = _rhythm(cfg, rung.batch, [count])
        for lr in sorted(study.lrs):
            name = _search_name(rung.label, lr)
            words = (
                *_common(cfg, rung, name, count, cfg.run.seed),
                f"schedule.warmup_samples={warmup}",
                f"optim.lr={lr:g}",
            )
            points.append(Point(name, "search", rung, count, cfg.run.seed, None, None, words))
    return tuple(points)


def _search_name(label: str, lr: float) -> str:
    return f"{label}-lr{lr:g}"


# What it may cost


def totals(points: Sequence[Point]) -> tuple[float, float | None]:
    """FLOPs and device-hours that points cost; hours None where one is unknown."""
    hours = [p.cost_hours for p in points]
    known = [h for h in hours if h is not None]
    return sum(p.cost_flops for p in points), sum(known) if len(known) == len(hours) else None


def hours_told(hours: float) -> str:
    """Hours in four digits or all whole ones: 5.992, 15,640."""
    return f"{hours:,.0f}" if hours >= 1e4 else f"{hours:,.4g}"


def _affordable(cfg: Config, rungs: Sequence[Rung]) -> tuple[float, ...]:
    """study.levels levels of compute: those with the most points, and of these the highest that the total allows."""
    study = cfg.study
    if not (study.total_flops or study.total_gpu_hours):
        raise ConfigError(
            f"study.levels={study.levels} needs study.total_flops or study.total_gpu_hours: what the study may cost"
        )
    if study.total_gpu_hours and any(rung.hours is None for rung in rungs):
        raise ConfigError(
            f"study.total_gpu_hours={study.total_gpu_hours:g} needs study.gpu: which kind of GPU"
        )
    smallest = min(rung.flops * max(study.min_samples, rung.batch) for rung in rungs)
    top = _most(cfg, rungs)
    best: tuple[float, ...] = ()
    most = 0
    while top >= smallest and most < study.levels * len(rungs) * study.seeds:
        levels = tuple(top / study.level_ratio**i for i in reversed(range(study.levels)))
        planned = _grid(cfg, rungs, levels)
        if len(planned) > most and _within(cfg, (*_search(cfg, _present(rungs, planned), planned), *planned)):
            best, most = levels, len(planned)
        top /= _FINER
    if best:
        return best
    raise ConfigError(
        f"{_limit(cfg)} is too small for any point: the smallest model, {rungs[0].label}, takes "
        f"{smallest:.2e} FLOPs for {max(study.min_samples, rungs[0].batch)} samples, and each size has "
        f"{study.seeds} run{'s' * (study.seeds > 1)}"
        + (f" and {len(study.lrs)} of the search" if study.lrs else "")
        + "; raise the total, or lower study.min_samples"
    )


def _present(rungs: Sequence[Rung], planned: Sequence[Point]) -> list[Rung]:
    here = {p.rung.label for p in planned}
    return [rung for rung in rungs if rung.label in here]


def _most(cfg: Config, rungs: Sequence[Rung]) -> float:
    """The highest level that one point alone could have."""
    study = cfg.study
    tops = [study.total_flops] if study.total_flops else []
    if study.total_gpu_hours:
        tops.append(max(study.total_gpu_hours / (rung.hours or math.inf) * rung.flops for rung in rungs))
    return min(min(tops), max(rung.flops for rung in rungs) * float(study.max_samples)) * study.level_ratio


def _within(cfg: Config, points: Sequence[Point]) -> bool:
    study = cfg.study
    spent, hours = totals(points)
    return (not study.total_flops or spent <= study.total_flops) and (
        not study.total_gpu_hours or (hours is not None and hours <= study.total_gpu_hours)
    )


def _limit(cfg: Config) -> str:
    study = cfg.study
    given = [f"study.total_flops={study.total_flops:g}"] if study.total_flops else []
    given += [f"study.total_gpu_hours={study.total_gpu_hours:g}"] if study.total_gpu_hours else []
    return " and ".join(given)


def _check_points(cfg: Config, planned: Sequence[Point], levels: Sequence[float]) -> None:
    """Raise ConfigError where the points that will be fitted cannot tell the law's parameters."""
    fitted = {(p.rung.params, p.samples) for p in planned if not p.rung.held_out}
    sizes, counts = ({point[i] for point in fitted} for i in (0, 1))
    if len(fitted) < PARAMETERS or len(sizes) < 3 or len(counts) < 3:
        why = (
            f"the plan has {len(fitted)} points to fit ({len(sizes)} sizes, {len(counts)} counts of samples), and the "
            f"law has {PARAMETERS} parameters: it needs {PARAMETERS} points or more, and three sizes and three counts"
        )
        if levels:
            why += (
                f"; of {len(levels)} levels of compute up to {max(levels):.2e} FLOPs, study.min_samples="
                f"{cfg.study.min_samples} and study.max_samples={cfg.study.max_samples} leave no more"
            )
        raise ConfigError(why)


def _check_total(study: Study) -> None:
    cfg = study.cfg
    if _within(cfg, study.points):
        return
    spent, hours = totals(study.points)
    if cfg.study.total_gpu_hours and hours is None:
        raise ConfigError(
            f"study.total_gpu_hours={cfg.study.total_gpu_hours:g} needs study.gpu: which kind of GPU"
        )
    told = f"{spent:.2e} FLOPs" + (f", {hours:.3g} device-hours" if hours is not None else "")
    raise ConfigError(
        f"{_limit(cfg)}: the {len(study.points)} runs cost {told}; raise the total, take fewer points, or let "
        "study.levels choose them"
    )
