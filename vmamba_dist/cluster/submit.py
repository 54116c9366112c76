"""Start a run as a job: show the plan, submit it, follow it.

Law: what is submitted is the resolved config; a dry run writes nothing and starts nothing.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from urllib.parse import urlparse

from vmamba_dist.cluster import env
from vmamba_dist.cluster.executors import apart_from_terminal, local_executor
from vmamba_dist.cluster.follow import REQUEUE, stay_with
from vmamba_dist.cluster.job import TrainJob
from vmamba_dist.config import Config, ConfigError, load, to_dict
from vmamba_dist.models import flops
from vmamba_dist.models.variants import configured, describe

LOG = "train.log"


@dataclass(frozen=True)
class Plan:
    """What a submission will do."""

    config: Config
    command: str  # that starts the same again

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run.dir).absolute()

    @property
    def job_folder(self) -> Path:
        return self.run_dir / "slurm"

    def text(self) -> str:
        """The plan for people: where, how many, and each value that is not a default."""
        launch = self.config.launch
        kind = "this process" if launch.cluster == "debug" else f"{_processes(launch.tasks)} on this machine"
        head = {
            "run": str(self.run_dir),
            "where": kind,
            "model": _model(self.config),
            "steps": f"{_budget(self.config)} in steps of {self.config.data.global_batch} samples",
            "logs": f"{self.job_folder}/START/",
            "command": self.command,
        }
        changed = [f"  {key}={value}" for key, value in _changes(self.config)]
        return "\n".join([*(f"{key:<8} {value}" for key, value in head.items()), "config", *changed])


def plan(verb: str, words: Sequence[str]) -> Plan:
    """Resolve the words of a command line; asking for GPUs asks for CUDA. Raises ConfigError."""
    config = load(words)
    if config.launch.gpus_per_node:
        if config.precision.device == "cpu":
            raise ConfigError("precision.device=cpu beside launch.gpus_per_node: take one of them away")
        config = replace(config, precision=replace(config.precision, device="cuda"))
    intent = Plan(config, shlex.join(["vmamba", verb, *words]))
    if config.launch.tasks > 1:
        _check_rendezvous(intent)
    return intent


def main(words: Sequence[str]) -> int:
    """Run `submit` with the words of its command line; return the job's exit code."""
    dry = "--dry-run" in words
    intent = plan("submit", [word for word in words if word != "--dry-run"])
    if dry:
        print(intent.text())
        return 0
    if intent.config.launch.cluster == "debug":
        return _run_here(intent)
    return run_as_job(intent, follow=intent.config.launch.follow)


def rendezvous(folder: Path) -> str:
    """Where torch's processes meet: a file. Not Path.as_uri: torch takes the path without unquoting it."""
    return f"file://{folder}/rendezvous"


def _check_rendezvous(intent: Plan) -> None:
    url = rendezvous(intent.job_folder)
    if f"file://{urlparse(url).path}" != url:  # as torch reads it
        raise ConfigError(
            f"run.dir={intent.config.run.dir!r}: several processes cannot meet below {str(intent.run_dir)!r}; "
            "use a path without '#', '?', tabs and line breaks"
        )


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def _budget(config: Config) -> str:
    schedule = config.schedule
    return f"{schedule.samples} samples" if schedule.samples else f"{schedule.epochs} epochs"


def _model(config: Config) -> str:
    model, side = configured(config.model), config.data.image_size
    classes = config.model.num_classes or 1000
    millions = flops.params(model, classes) / 1e6
    try:
        giga = flops.macs(model, side, side, classes) / 1e9
    except ValueError as error:
        raise ConfigError(f"data.image_size={side}: {error}") from error
    counts = f"{millions:.2f} M parameters, {giga:.3f} GMACs at {side} px with {classes} classes"
    return f"{describe(config.model)}, {counts}"


def _changes(config: Config) -> list[tuple[str, object]]:
    ours, defaults = to_dict(config), to_dict(Config())
    return [
        (f"{group}.{key}", value)
        for group, part in ours.items()
        for key, value in part.items()
        if value != defaults[group][key]
    ]


def _run_here(intent: Plan) -> int:
    if intent.config.launch.tasks > 1:
        print(f"launch.cluster=debug: one process, not {intent.config.launch.tasks}")
    from vmamba_dist.train import run  # not above: submitting needs no torch

    return run(intent.config).exit_code


def run_as_job(intent: Plan, *, follow: bool) -> int:
    """Start the plan's processes. Followed, they end with this process, and their exit code is returned."""
    launch = intent.config.launch
    start = f"{datetime.now():%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}"
    folder = intent.job_folder / start  # of this start alone: ranks of an earlier one never meet there
    folder.mkdir(parents=True)
    log = intent.run_dir / LOG
    since = log.stat().st_size if log.exists() else 0
    tether = folder / "tether" if follow else None
    work = TrainJob(
        config=to_dict(intent.config),
        rendezvous=rendezvous(folder),
        devices=env.visible_devices(),
        tether=str(tether) if tether else None,
    )
    with _held(tether) if tether else nullcontext():
        with apart_from_terminal(folder / "controller.log"):
            job = local_executor(folder, launch).submit(work)
        print(
            f"{launch.name}: job {job.job_id}, {_processes(launch.tasks)}, run {intent.config.run.dir}",
            flush=True,
        )
        if not follow:
            print(
                f"it goes on alone; progress: tail -f {log}; to stop it (it saves first): kill {job.job_id}"
            )
            return 0
        code = stay_with(job, launch.tasks, log, since=since)
    if code == REQUEUE:
        print(f"stopped; to go on: {intent.command}")
    return code


@contextmanager
def _held(tether: Path) -> Iterator[None]:
    """Hold the lock that ties the job to this process: ranks that can take it know that we are gone."""
    descriptor = os.open(tether, os.O_CREAT | os.O_RDWR)  # not inherited: only this process holds it
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        tether.unlink()
        os.close(descriptor)
