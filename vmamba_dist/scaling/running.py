"""`vmamba study run`: a study's points through the sweep, its learning-rate search first.

Law: a point is an ordinary run, and what has finished is read from its run directory; the learning rates that the
search came to are written down once (lrs.json), so that a later start cannot choose others for the points that are
left. Run again after any kind of end, it goes on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from vmamba_dist.cluster import points as sweep_points
from vmamba_dist.cluster.follow import REQUEUE
from vmamba_dist.cluster.points import write
from vmamba_dist.cluster.submit import command_line
from vmamba_dist.cluster.sweep import PointResult, exit_code, overview, run_points, take_parallel
from vmamba_dist.config import ConfigError, load_beside
from vmamba_dist.scaling.runs import losses_of, read_point
from vmamba_dist.scaling.study import Choice, Point, Study, choose_lrs, plan_study

LRS = "lrs.json"  # in a study's folder
_SETTLED = ("finished", "failed")


def main(words: Sequence[str]) -> int:
    """Run a study; return 0 when its grid has finished, 1 where a point failed, 75 where it was stopped."""
    cfg, said = load_beside(words, "sweep")
    parallel = take_parallel(said)
    if said:
        raise ConfigError(
            f"sweep.{next(iter(said))}: a study names its points itself; only sweep.parallel is taken"
        )
    study = plan_study(cfg)
    command = command_line("study", ["run", *words])

    searched = run(study, study.search, parallel=parallel, command=command)
    if any(result.state not in _SETTLED for result in searched):
        return _told(searched, REQUEUE)
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
    losses = losses_of([read_point(point, folder) for point in study.search])
    choices = choose_lrs(study, losses)
    content = {
        "search": _tried(study),
        "losses": losses,
        "chosen": {label: asdict(choice) for label, choice in choices.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / LRS, json.dumps(content, indent=1) + "\n")
    return choices


def recorded(study: Study) -> dict[str, Choice] | None:
    """Each rung's learning rate as the grid has it; None before it is chosen.

    Raises ConfigError where the record is of another search.
    """
    file = Path(study.cfg.run.dir) / LRS
    if not file.exists():
        return None
    record = json.loads(file.read_text())
    found = {label: Choice(**choice) for label, choice in record["chosen"].items()}
    if record["search"] != _tried(study) or set(found) != {rung.label for rung in study.rungs}:
        raise ConfigError(
            f"{file} holds the learning rates of another search or ladder; take another run.dir, or remove the "
            "file and the runs of the grid"
        )
    return found


def _tried(study: Study) -> list[str]:
    return sorted(point.name for point in study.search)


def _told(results: Sequence[PointResult], code: int) -> int:
    print(f"\n{overview(results)}", flush=True)
    return code
