"""A sweep's points as elements of Slurm arrays, so many at a time.

Law: an element is the same job that `vmamba submit` would queue for the point: it saves, requeues and goes on alone.
A point that begins in another's checkpoint is queued at once too, to start when that one has ended.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from vmamba_dist.cluster import executors, snapshot, status
from vmamba_dist.cluster.executors import slurm_executor
from vmamba_dist.cluster.job import TrainJob
from vmamba_dist.cluster.points import Planned, Sweep, checkpoint_of, write
from vmamba_dist.cluster.submit import Plan, for_slurm, start_name
from vmamba_dist.config import ConfigError, to_dict
from vmamba_dist.config.schema import LaunchConfig

_Parents = frozenset[str]  # Slurm's ids of the jobs that have to end first


def submit(sweep: Sweep, points: Sequence[Planned], in_queue: Collection[str]) -> list[str]:
    """Queue points, independent ones as one array; return the arrays' ids.

    in_queue: names of points that are queued or running already. Raises ConfigError, with nothing of that array queued.
    """
    if not points:
        return []
    code = snapshot.take(sweep.folder.absolute() / "code")
    arrays: list[str] = []
    waiting = list(points)
    while waiting:
        coming = {one.point.name for one in waiting}
        ready = [one for one in waiting if not _parent(sweep, one, coming)]
        if not ready:
            raise ConfigError(f"points that begin in each other's checkpoints: {', '.join(sorted(coming))}")
        waiting = [one for one in waiting if one not in ready]
        by_parents: dict[_Parents, list[Planned]] = {}
        for one in ready:
            parent = _parent(sweep, one, in_queue)
            jobs = frozenset([status.job_of(sweep.folder / parent)] if parent else [])
            by_parents.setdefault(jobs if len(jobs - {""}) else frozenset(), []).append(one)
        for parents, group in _merged(by_parents):
            arrays.append(_queue(sweep, group, code, parents))
        in_queue = {*in_queue, *(one.point.name for one in ready)}
    return arrays


def _merged(groups: dict[_Parents, list[Planned]]) -> list[tuple[_Parents, list[Planned]]]:
    """Those that wait for nothing as one array, and all that wait as another: each for every parent."""
    free = groups.pop(frozenset(), [])
    bound = [one for group in groups.values() for one in group]
    found: list[tuple[_Parents, list[Planned]]] = [(frozenset(), free)] if free else []
    return [*found, (frozenset().union(*groups), bound)] if bound else found


def _parent(sweep: Sweep, one: Planned, names: Collection[str]) -> str:
    """The point that has to end before this one starts, if it is among `names`; "" where none has to."""
    branch = one.point.branch
    if branch is None or status.newest(one.run) or checkpoint_of(sweep.folder, branch).is_dir():
        return ""
    return branch.of if branch.of in names else ""


def _queue(sweep: Sweep, points: Sequence[Planned], code: Path, after: _Parents) -> str:
    plans = [for_slurm(_on_gpus(Plan(one.config, sweep.command))) for one in points]
    folder = sweep.folder.absolute() / "slurm" / start_name()
    command = f"cd {shlex.quote(str(Path.cwd()))} && {sweep.command}"
    works = [TrainJob(to_dict(each.config), command=command) for each in plans]
    executor = slurm_executor(folder, _shared(plans), code=code, parallelism=sweep.parallel)
    if after:
        executor.update_parameters(dependency=f"afterany:{':'.join(sorted(after))}")
    try:
        jobs = executors.submit(executor, works)
    except ConfigError:
        shutil.rmtree(folder, ignore_errors=True)  # jobs' files without jobs
        raise
    for one, job in zip(points, jobs, strict=True):
        sweep.file(one, "json").unlink(missing_ok=True)
        write(sweep.file(one, "job"), f"{job.job_id}\n")
    return str(jobs[0].job_id).partition("_")[0]


def _on_gpus(plan: Plan) -> Plan:
    """Asking for GPUs asks for CUDA, as `vmamba submit` takes it."""
    if not plan.config.launch.gpus_per_node:
        return plan
    return replace(plan, config=replace(plan.config, precision=replace(plan.config.precision, device="cuda")))


def _shared(plans: Sequence[Plan]) -> LaunchConfig:
    """What an array asks of Slurm: its elements differ in their readers at most, and get the most of them."""
    launches = [plan.config.launch for plan in plans]
    cpus = max(launch.cpus_per_task or 1 for launch in launches)
    names = {launch.name for launch in launches}
    return replace(launches[0], cpus_per_task=cpus, name=names.pop() if len(names) == 1 else "sweep")
