"""`vmamba study plan`: the points of a study, the rules behind them, what each costs and the total.

Law: nothing runs and nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from vmamba_dist.config import load
from vmamba_dist.models.variants import configured
from vmamba_dist.scaling.command import samples_and_classes
from vmamba_dist.scaling.runs import FEW
from vmamba_dist.scaling.study import Point, Study, hours_told, plan_study, totals


def main(words: Sequence[str]) -> int:
    """Print the plan of a study's config."""
    print("\n".join(text(plan_study(load(words)))))
    return 0


def text(study: Study) -> list[str]:
    """Return the plan for people, as lines."""
    return [*_head(study), "", *_ladder(study), "", *_costs(study), "", *_rules(study)]


def _head(study: Study) -> Iterator[str]:
    cfg = study.cfg
    fitted = [p for p in study.planned if not p.rung.held_out]
    cells = {(p.rung.label, p.samples) for p in fitted}
    yield (
        f"study    {cfg.run.dir}, {len(study.points)} runs: {len(study.search)} of the search, "
        f"{len(study.planned)} of the grid"
    )
    yield (
        f"grid     {len({p.rung.label for p in study.planned})} sizes at {cfg.data.image_size} px with {study.classes} "
        f"classes, {cfg.study.seeds} seed{'s' * (cfg.study.seeds > 1)}; {len(fitted)} runs on {len(cells)} points are "
        f"fitted, {len(study.planned) - len(fitted)} held out"
    )
    if study.levels:
        yield f"levels   C = {', '.join(f'{level:.2e}' for level in study.levels)} training FLOPs"
    yield f"total    {_told(study, study.points)}"


def _ladder(study: Study) -> Iterator[str]:
    yield (
        f"{'model':<22}{'dims':>22}{'depths':>14}{'params, M':>11}{'GMACs':>10}{'batch':>7}  "
        f"samples (a cost in brackets: {_unit(study)})"
    )
    for rung in study.rungs:
        variant = configured(rung.model)
        points = [p for p in study.planned if p.rung == rung and p.seed == study.cfg.run.seed]
        told = ", ".join(f"{p.samples} ({_one(p)})" for p in sorted(points, key=lambda p: p.samples))
        dims, depths = ("/".join(map(str, values)) for values in (variant.dims, variant.depths))
        name = rung.label + " *" * rung.held_out
        yield (
            f"{name:<22}{dims:>22}{depths:>14}{rung.params / 1e6:>11.3f}{rung.macs / 1e9:>10.4g}{rung.batch:>7}  "
            f"{told or 'no point within the limits'}"
        )
    if any(rung.held_out for rung in study.rungs):
        yield "* held out of the fit, and predicted"


def _costs(study: Study) -> Iterator[str]:
    yield "cost"
    parts: list[tuple[str, Sequence[Point]]] = [
        (f"grid, {rung.label}", [p for p in study.planned if p.rung == rung]) for rung in study.rungs
    ]
    if study.search:
        parts.insert(0, ("search of the learning rate", study.search))
    for name, points in [*parts, ("total", study.points)]:
        if points:
            yield f"  {name:<30}{len(points):>5} runs  {_told(study, points)}"
    shared = sum(p.flops - p.cost_flops for p in study.planned)
    if shared:
        whole = sum(p.flops for p in study.points)
        yield f"  branching saves {shared:.2e} FLOPs, {shared / whole:.0%} of what unshared runs would cost"


def _rules(study: Study) -> Iterator[str]:
    cfg = study.cfg
    smallest = study.rungs[0].label
    yield "rules"
    yield "  C = 6 × multiply-adds of a forward × samples; N is parameters without the classifier; D is samples seen"
    if cfg.study.batch_power:
        yield (
            f"  batch = {cfg.data.global_batch} × (N / N of {smallest}) ^ {cfg.study.batch_power:g}, in whole multiples"
        )
    else:
        yield f"  batch = {cfg.data.global_batch} for every size"
    if study.search:
        sizes = len({p.rung.label for p in study.search if not p.rung.held_out})
        beside = " and the held-out ones" if cfg.study.search_held_out else ""
        counts = sorted({p.samples for p in study.search})
        yield (
            f"  lr: each of {', '.join(f'{lr:g}' for lr in sorted(cfg.study.lrs))} at the {sizes} smallest "
            f"sizes{beside} with {' or '.join(map(str, counts))} samples; the lowest loss, by a parabola in log lr"
        )
        yield "  lr of other sizes: a power law of N through those, kept within what was tried"
        yield "  lr of other budgets: the same"
    else:
        yield f"  lr = {cfg.optim.lr:g} × (N / N of {smallest}) ^ {cfg.study.lr_power:g}"
    if any(p.branch_from for p in study.planned):
        yield (
            "  branching: of each size and seed the longest run keeps checkpoints of its constant phase, where "
            "the others start"
        )
    few = [p for p in study.planned if p.samples < FEW * study.classes]
    if few:
        yield (
            f"  note: {len(few)} runs see fewer than {FEW} samples a class, where losses have shown a transition of "
            "learning rather than a power law"
        )
    held = _samples_there(study)
    again = [p for p in study.planned if held is not None and p.samples > held]
    if again:
        assert held is not None
        most = max(p.samples for p in again) / held
        yield (
            f"  note: {len(again)} runs repeat the set's {held} samples, up to {most:.3g} times; "
            "D counts repeats as fresh samples, which they are not"
        )
    if cfg.study.gpu:
        yield (
            f"  hours: `vmamba plan`'s model of {cfg.study.gpus} × {cfg.study.gpu} a run; evaluation and saving "
            "cost nothing"
        )
    elif cfg.study.device_gflops:
        yield f"  hours: of one process that sustains {cfg.study.device_gflops:g} GFLOP/s, as told"


def _samples_there(study: Study) -> int | None:
    """Samples of the training split, where its index is on this machine."""
    train = study.cfg.data.train
    if not isinstance(train, str) or not train or not (Path(train) / "_info.json").is_file():
        return None
    return samples_and_classes(study.cfg)[0]


def _unit(study: Study) -> str:
    if any(rung.hours is None for rung in study.rungs):
        return "FLOPs"
    return "GPU-hours" if study.cfg.study.gpu else "hours of one process"


def _one(point: Point) -> str:
    return f"{point.cost_flops:.1e}" if point.cost_hours is None else f"{point.cost_hours:.3g}"


def _told(study: Study, points: Sequence[Point]) -> str:
    spent, hours = totals(points)
    return f"{spent:.2e} FLOPs" + (f", {hours_told(hours)} {_unit(study)}" if hours is not None else "")
