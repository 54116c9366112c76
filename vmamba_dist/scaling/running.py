"""`vmamba study run`: a study's points through the sweep, its learning-rate search first.

Law: a point is an ordinary run, and what has finished is read from its run directory; the learning rates that the
search came to are written down once (lrs.json), so that a later start cannot choose others for the points that are
left, and runs nothing of the search again. Run again after any kind of end, it goes on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from vmamba_dist.cluster import points as sweep_points
from vmamba_dist.cluster import status
from vmamba_dist.cluster.follow import REQUEUE
from vmamba_dist.cluster.points import write
from vmamba_dist.cluster.submit import command_line
from vmamba_dist.cluster.sweep import PointResult, exit_code, gather, overview, run_points, take_parallel
from vmamba_dist.config import Config, ConfigError, load_beside
from vmamba_dist.data.index import INFO
from vmamba_dist.scaling.runs import LRS, losses_of, read_point, recorded, tried
from vmamba_dist.scaling.study import Choice, Point, Study, choose_lrs, plan_study

_SETTLED = ("finished", "failed")
_TOLD = 4  # runs whose reasons an error quotes


def main(words: Sequence[str]) -> int:
    """Run a study; return 0 when its grid has finished, 1 where a point failed, 75 where it was stopped."""
    cfg, said = load_beside(words, "sweep")
    parallel = take_parallel(said)
    if said:
        raise ConfigError(
            f"sweep.{next(iter(said))}: a study names its points itself; only sweep.parallel is taken"
        )
    if cfg.launch.follow is False:
        raise ConfigError(
            "launch.follow=false: a study stays until its search has ended, as the grid gets its learning rates from "
            "there; leave the key out (on Slurm Ctrl-C leaves the jobs, and the same command goes on)"
        )
    study = plan_study(cfg)
    check_data(cfg)
    command = command_line("study", ["run", *words])

    if recorded(study) is None:
        searched = run(study, study.search, parallel=parallel, command=command)
        if any(result.state not in _SETTLED for result in searched):
            return _told(searched, REQUEUE)
    else:  # the choice stands: a failed run of the search could change nothing
        searched = standing(study, study.search)
    choices = chosen(study)
    for label, choice in choices.items():
        print(f"optim.lr of {label}: {choice.lr:.3g} ({choice.how})", flush=True)
    grid = study.grid({label: choice.lr for label, choice in choices.items()})
    results = run(study, grid, parallel=parallel, command=command, beside=searched)
    return _told([*searched, *results], exit_code(results))


def run(
    study: Study,
    points: Sequence[Point],
    *,
    parallel: int,
    command: str,
    beside: Sequence[PointResult] = (),
) -> list[PointResult]:
    """Run some of a study's points; those that branch start from their trunk's checkpoint."""
    if not points:
        return []
    return run_points(
        [as_swept(point) for point in points],
        base=study.cfg,
        folder=Path(study.cfg.run.dir),
        parallel=parallel,
        command=command,
        beside=beside,
    )


def standing(study: Study, points: Sequence[Point]) -> list[PointResult]:
    """How some of a study's points stand, without starting any."""
    if not points:
        return []
    folder = Path(study.cfg.run.dir)
    planned = sweep_points.plan([as_swept(point) for point in points], study.cfg, folder)
    jobs = status.queue() if study.cfg.launch.on_slurm else None
    return gather(sweep_points.Sweep(folder, planned, 1, ""), jobs)


def check_data(cfg: Config) -> None:
    """Refuse training data that is not there before every point fails by it. Raises ConfigError.

    Stores are left to the runs; and on Slurm so is a folder that only the nodes may see, which is told.
    """
    if not cfg.data.train:
        raise ConfigError("data.train is not set: give shards, as `vmamba shards pack` makes them")
    named = (
        {"data.train": cfg.data.train}
        if isinstance(cfg.data.train, str)
        else {f"data.train[{i}].path": source.path for i, source in enumerate(cfg.data.train)}
    )
    for key, address in named.items():
        if "://" in address or "{" in address:  # of a store, or a pattern of tars
            continue
        root = Path(address)
        if root.is_file() or (root / INFO).is_file() or any(root.glob("*.tar")):
            continue
        why = f"{key}={address!r} " + (f"has no {INFO} and no tars" if root.is_dir() else "is not there")
        if not cfg.launch.on_slurm:
            raise ConfigError(
                f"{why}; make it with `vmamba shards pack` or `vmamba shards fractal`, or mend the path"
            )
        print(f"note: {why}, seen from here; the nodes must see it", flush=True)


def as_swept(point: Point) -> sweep_points.Point:
    """A study's point as the sweep takes it, which finds the directory itself and names an array as a whole."""
    branch = point.branch_from
    begins = sweep_points.Branch(branch.point, branch.step) if branch else None
    words = (word for word in point.words if not word.startswith(("run.dir=", "launch.name=")))
    return sweep_points.Point(point.name, tuple(words), begins)


def chosen(study: Study) -> dict[str, Choice]:
    """Each rung's learning rate: the recorded ones, or those that the search's runs come to, recorded now.

    Raises ConfigError where a searched rung has no finite loss, or the record is of another search.
    """
    folder = Path(study.cfg.run.dir)
    found = recorded(study)
    if found is not None:
        return found
    runs = [read_point(point, study.cfg) for point in study.search]
    losses = losses_of(runs)
    try:
        choices = choose_lrs(study, losses)
    except ConfigError as error:
        told = "; ".join(f"{r.name}: {r.why}" for r in [r for r in runs if not r.finished][:_TOLD])
        raise ConfigError(f"{error}. Of its runs: {told}") from error
    content = {
        "search": tried(study),
        "losses": losses,
        "chosen": {label: asdict(choice) for label, choice in choices.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / LRS, json.dumps(content, indent=1) + "\n")
    return choices


def _told(results: Sequence[PointResult], code: int) -> int:
    print(f"\n{overview(results)}", flush=True)
    return code
