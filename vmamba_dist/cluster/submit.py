"""Start a run as a job: show the plan, submit it, follow it.

Law: what is submitted is the resolved config; a dry run writes nothing and starts nothing. What cannot work is
refused before anything is queued, with the numbers.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from urllib.parse import urlparse

from vmamba_dist.cluster import env, executors, slurm, snapshot
from vmamba_dist.cluster.executors import apart_from_terminal, local_executor, slurm_executor
from vmamba_dist.cluster.follow import REQUEUE, stay_with, watch_slurm
from vmamba_dist.cluster.job import TrainJob
from vmamba_dist.config import Config, ConfigError, load, to_dict
from vmamba_dist.config.schema import LaunchConfig
from vmamba_dist.data.order import choose_accumulate
from vmamba_dist.models import flops
from vmamba_dist.models.variants import configured, describe

LOG = "train.log"
# What a start on Slurm spends of its time limit beside training.
START_S = 60  # until the first step: a launch, imports, a checkpoint to load
SAVE_S = 10  # two steps and a save of a small model: nothing needs less
EARLY_S = 60  # by which Slurm's warning may come before it was asked for


@dataclass(frozen=True)
class Plan:
    """What a submission will do."""

    config: Config
    command: str  # that starts the same again

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run.dir).absolute()

    @property
    def code(self) -> Path:
        return self.run_dir / "code"

    @property
    def job_folder(self) -> Path:
        return self.run_dir / "slurm"

    def text(self, estimate: Mapping[str, str] | None = None) -> str:
        """The plan for people: where, how many, and each value that is not a default; lines of `estimate` go before."""
        head = {
            "run": str(self.run_dir),
            "where": _where(self.config.launch),
            "model": _model(self.config),
            "steps": f"{_budget(self.config)} in steps of {self.config.data.global_batch} samples",
            **(estimate or {}),
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
    intent = Plan(config, command_line(verb, words))
    if config.launch.tasks > 1 and (verb == "train" or not config.launch.on_slurm):
        _check_rendezvous(intent)
    return intent


def command_line(verb: str, words: Sequence[str]) -> str:
    """`vmamba VERB …` for a shell on whose PATH this environment is not, as it is on most compute nodes."""
    script = Path(sys.executable).with_name("vmamba")
    program = [str(script)] if script.exists() else [sys.executable, "-m", "vmamba_dist.cli"]
    return shlex.join([*program, verb, *words])


def main(words: Sequence[str], *, estimate: Callable[[Config], Mapping[str, str]] | None = None) -> int:
    """Run `submit` with the words of its command line; return the job's exit code, 0 where nobody stays with it.

    estimate: what a room above this one knows of a config, as lines of the plan by name.
    """
    flags = {"--dry-run", "--follow"} & set(words)
    intent = plan("submit", [word for word in words if word not in flags])
    launch = intent.config.launch
    follow = "--follow" in flags or (not launch.on_slurm if launch.follow is None else launch.follow)
    if launch.on_slurm:
        intent = for_slurm(intent)
    if "--dry-run" in flags:
        print(intent.text(estimate(intent.config) if estimate else None))
        if launch.on_slurm:
            executor = slurm_executor(
                intent.job_folder / "START", intent.config.launch, code=intent.code / "CODE"
            )
            print(f"\n{executor.script()}")
        return 0
    if launch.on_slurm:
        return run_on_slurm(intent, follow=follow)
    if launch.cluster == "debug":
        return _run_here(intent)
    return run_as_job(intent, follow=follow)


def for_slurm(intent: Plan) -> Plan:
    """The plan as a Slurm job needs it: paths that hold anywhere, cores named, a limit that leaves time to train.

    Raises ConfigError.
    """
    config = intent.config
    executors.check_path(intent.run_dir)
    _check_start(config)
    launch = config.launch
    if launch.signal_delay_s < SAVE_S:
        raise ConfigError(
            f"launch.signal_delay_s={launch.signal_delay_s}: two steps and a save take longer, and what is not saved "
            f"by the limit is lost; use {SAVE_S} s or more"
        )
    if launch.time_limit_min is not None:
        _check_limit(launch.time_limit_min, launch.signal_delay_s, launch.partition)
    launch = replace(launch, cpus_per_task=launch.cpus_per_task or 1 + config.data.workers)
    run = replace(config.run, dir=str(intent.run_dir))
    return replace(intent, config=replace(config, run=run, launch=launch))


def _check_start(config: Config) -> None:
    """Refuse what every start would refuse, after hours in the queue. The shards may be on other machines: not read."""
    _model(config)
    if not config.data.train:
        raise ConfigError("data.train is not set: give shards, as `vmamba shards pack` makes them")
    world = config.launch.nodes * config.launch.tasks
    config.parallel.copies_and_shards(world)
    choose_accumulate(config.data.global_batch, world, config.parallel.micro_batch)


def _check_limit(limit: int, signal_delay_s: int, partition: str) -> None:
    needed = START_S + EARLY_S + signal_delay_s
    if 60 * limit <= needed:
        raise ConfigError(
            f"launch.time_limit_min={limit}: a start takes {START_S} s, and the word to save comes "
            f"launch.signal_delay_s={signal_delay_s} s (two steps and the save) before the limit and up to {EARLY_S} s "
            f"earlier: {needed} s of {60 * limit} s without training; use {needed // 60 + 1} minutes or more"
        )
    most = slurm.limit_min(partition)
    if most is not None and limit > most:
        raise ConfigError(
            f"launch.time_limit_min={limit}: partition {partition or '(the default one)'} allows {most} minutes; "
            "use that or less, the job goes on by itself"
        )


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


def _where(launch: LaunchConfig) -> str:
    if launch.cluster == "debug":
        return "this process"
    if not launch.on_slurm:
        return f"{_processes(launch.tasks)} on this machine"
    nodes = "1 node" if launch.nodes == 1 else f"{launch.nodes} nodes"
    gpus = f", {launch.nodes * launch.gpus_per_node} GPUs" if launch.gpus_per_node else ""
    limit = f", {launch.time_limit_min} minutes a start" if launch.time_limit_min else ""
    return f"{nodes} of Slurm, {_processes(launch.tasks)} each{gpus}{limit}"


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
    if launch.nodes > 1:
        raise ConfigError(
            f"launch.nodes={launch.nodes}: vmamba train is one machine; use vmamba submit, or torchrun on each"
        )
    folder = intent.job_folder / start_name()  # of this start alone: ranks of an earlier one never meet there
    folder.mkdir(parents=True)
    log = intent.run_dir / LOG
    since = log.stat().st_size if log.exists() else 0
    tether = folder / "tether" if follow else None
    work = TrainJob(
        config=to_dict(intent.config),
        rendezvous=rendezvous(folder),
        devices=env.visible_devices(),
        tether=str(tether) if tether else None,
        command=intent.command,
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


def run_on_slurm(intent: Plan, *, follow: bool) -> int:
    """Queue the plan; say where it is and how to look after it. Raises ConfigError, with nothing queued."""
    launch = intent.config.launch
    folder = intent.job_folder / start_name()
    log = intent.run_dir / LOG
    since = log.stat().st_size if log.exists() else 0
    code = snapshot.take(intent.code)
    work = TrainJob(to_dict(intent.config), command=f"cd {shlex.quote(str(Path.cwd()))} && {intent.command}")
    (job,) = executors.submit(slurm_executor(folder, launch, code=code), [work])
    told = {
        "job": f"{job.job_id}, {launch.name}: {_where(launch)}",
        "run": str(intent.run_dir),
        "log": f"{log}; its processes': {folder}/{job.job_id}_*",
        "follow": f"tail -F {shlex.quote(str(log))}",
        "cancel": f"scancel {job.job_id}",
        "resume": intent.command,
    }
    print("\n".join(f"{key:<8} {value}" for key, value in told.items()), flush=True)
    return watch_slurm(str(job.job_id), intent.run_dir, log, since=since) if follow else 0


def start_name() -> str:
    """A folder name of this submission alone, in the order of time."""
    return f"{datetime.now():%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}"


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
