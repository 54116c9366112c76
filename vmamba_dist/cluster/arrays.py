"""A sweep's points as elements of Slurm arrays, so many at a time.

Law: an element is the same job that `vmamba submit` would queue for the point: it saves, requeues and goes on alone.
Points that begin in others' checkpoints are queued at once too, as an array that starts when all of those have ended.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from vmamba_dist.cluster import executors, snapshot, status
from vmamba_dist.cluster.executors import slurm_executor
from vmamba_dist.cluster.job import TrainJob
from vmamba_dist.cluster.points import Planned, Sweep, checkpoint_of, write
from vmamba_dist.cluster.submit import Plan, for_slurm, start_name
from vmamba_dist.config import to_dict
from vmamba_dist.config.schema import LaunchConfig


def submit(sweep: Sweep, points: Sequence[Planned], in_queue: Collection[str]) -> list[str]:
    """Queue points, independent ones as one array; return the arrays' ids.

    in_queue: names of points that are queued or running already. Raises ConfigError, with nothing of that array queued.
    """
    if not points:
        return []
    code = snapshot.take(sweep.folder.absolute() / "code")
    arrays: list[str] = []
    waiting = list(points)
    there = set(in_queue)
    while waiting:
        coming = {one.point.name for one in waiting}
        ready = [one for one in waiting if not _parent(sweep, one, coming)]
        assert ready, "a sweep's branches come to an end"
        waiting = [one for one in waiting if one not in ready]
        free = [one for one in ready if not _parent(sweep, one, there)]
        bound = [one for one in ready if one not in free]
        for group in filter(None, (free, bound)):
            parents = {_parent(sweep, one, there) for one in group} - {""}
            after = {status.job_of(sweep.folder / parent) for parent in parents} - {""}
            arrays.append(_queue(sweep, group, code, sorted(after)))
        there |= {one.point.name for one in ready}
    return arrays


def _parent(sweep: Sweep, one: Planned, names: Collection[str]) -> str:
    """The point that has to end before this one starts, if it is among `names`; "" where none has to."""
    branch = one.point.branch
    if branch is None or status.newest(one.run) or checkpoint_of(sweep.folder, branch).is_dir():
        return ""
    return branch.of if branch.of in names else ""


def _queue(sweep: Sweep, points: Sequence[Planned], code: Path, after: Sequence[str]) -> str:
    """Queue an array whose elements start when all of the jobs `after` have ended; return its id."""
    plans = [for_slurm(_on_gpus(Plan(one.config, sweep.command))) for one in points]
    folder = sweep.folder.absolute() / "slurm" / start_name()
    command = f"cd {shlex.quote(str(Path.cwd()))} && {sweep.command}"
    works = [TrainJob(to_dict(each.config), command=command) for each in plans]
    executor = slurm_executor(folder, _shared(plans), code=code, parallelism=sweep.parallel)
    if after:
        executor.update_parameters(dependency=f"afterany:{':'.join(after)}")
    jobs = executors.submit(executor, works)
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
