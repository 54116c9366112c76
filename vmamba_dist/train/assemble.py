"""From a config to a run, in the order in which things come to life.

Law: every rank makes the same choices from the same facts; what rank 0 alone decides is told to all.
"""

from __future__ import annotations

import itertools
import logging
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from vmamba_dist.checkpoint.save import Checkpoints, Found
from vmamba_dist.checkpoint.store import Meta
from vmamba_dist.config import Config, ConfigError, digest, to_dict, to_yaml, trajectory
from vmamba_dist.config.schema import OptimConfig, ScheduleConfig
from vmamba_dist.core.dist import World, gather, on_main
from vmamba_dist.core.log import logging_to, progress_bar
from vmamba_dist.core.precision import compute_dtype
from vmamba_dist.core.rundir import RunDir
from vmamba_dist.core.state import TrainState
from vmamba_dist.data.ahead import ahead_on_device
from vmamba_dist.data.augment import DeviceTransform, Normalize
from vmamba_dist.data.badlog import BadLog, cut_torn_line
from vmamba_dist.data.batch import Batch
from vmamba_dist.data.order import choose_lanes
from vmamba_dist.data.shards import Index
from vmamba_dist.data.stream import TrainStream, eval_batches
from vmamba_dist.evaluation.classification import ClassificationEvaluator
from vmamba_dist.models import create_model, flops
from vmamba_dist.models.variants import configured, overrides_of
from vmamba_dist.objectives.classify import Classify
from vmamba_dist.optim.schedule import Schedule, build_schedule, total_samples
from vmamba_dist.parallel.plan import parallelize
from vmamba_dist.train import rollback
from vmamba_dist.train.board import Board
from vmamba_dist.train.ema import Ema
from vmamba_dist.train.environment import describe_environment, record_environment
from vmamba_dist.train.feed import Feed
from vmamba_dist.train.health import autopsy
from vmamba_dist.train.meter import Meter, MetricsLog, memory_gib, peak_tflops
from vmamba_dist.train.pace import Pace
from vmamba_dist.train.probe import Probe
from vmamba_dist.train.progress import Progress
from vmamba_dist.train.record import Record, Writers
from vmamba_dist.train.run import Every, Origin, Run, best_metric
from vmamba_dist.train.sources import Sources
from vmamba_dist.train.stopping import StopRequest
from vmamba_dist.train.watch import Watch

log = logging.getLogger(__name__)
_OBJECTIVES = {"classify": Classify}


@contextmanager
def assembled(cfg: Config, sources: Sources, world: World, stop: StopRequest) -> Iterator[Run]:
    """Build a run, resumed where it has a checkpoint; everything is closed at the end. A collective."""
    with ExitStack() as closing:
        run_dir = _own(cfg, world, closing)
        progress = Progress(world.device)
        if world.size > 1:
            watch = Watch(run_dir.alive, run_dir.attempt, world, progress, cfg.parallel.timeout_s)
            closing.enter_context(watch.watching())
        state = TrainState()
        objective = build_objective(cfg, sources.num_classes)
        engine = parallelize(
            objective,
            parallel=cfg.parallel,
            precision=cfg.precision,
            optim=cfg.optim,
            world=world,
            seed=cfg.run.seed,
        )
        closing.callback(engine.close)
        ema = Ema(engine, cfg.ema) if cfg.ema.enabled else None
        checkpoints = Checkpoints(
            run_dir,
            cfg.checkpoint,
            world,
            metric=best_metric(cfg.eval, has_ema=ema is not None),
            timeout_s=cfg.parallel.timeout_s,
        )
        closing.callback(checkpoints.close)
        identity = _identity(cfg, sources)
        steps_per_epoch = sources.train.num_samples // cfg.data.global_batch
        schedule = _schedule(cfg.schedule, cfg.optim, cfg.data.global_batch, steps_per_epoch)
        found = _resume(cfg, checkpoints, identity, schedule, steps_per_epoch)
        _describe(cfg, run_dir, world)
        if found is not None:
            tensors = engine.state() | (ema.state() if ema is not None else {})
            checkpoints.load(found, tensors)
            engine.load(tensors)
            if ema is not None:
                ema.load(tensors)
            state.load_dict(found.meta.state)
        rollback.apply(state, on_main(lambda: rollback.recorded(run_dir.rollbacks)))
        state.lanes = state.lanes or choose_lanes(
            sources.train.num_samples,
            sources.train.mean_bytes,
            block=cfg.data.block,
            shuffle_gib=cfg.data.shuffle_gib,
            world=world.size,
            workers=cfg.data.workers,
            lanes=cfg.data.lanes,
        )
        log.info("attempt %d begins at step %d", run_dir.attempt, state.step + 1)

        total_steps = schedule.total_samples // cfg.data.global_batch
        state.align(cfg.data.global_batch, steps_per_epoch)
        pace = probe = None
        if world.size > 1:
            pace = Pace(gather(socket.gethostname()), cfg.telemetry.log_every_steps)
            compute = compute_dtype(cfg.precision.compute)
            probe = Probe(world.device, compute, cfg.telemetry.log_every_steps)
        writers = _writers(cfg, run_dir, state, total_steps, pace, closing) if world.is_main else None
        bad_log = closing.enter_context(BadLog(run_dir.bad))
        stream = TrainStream(
            sources.train,
            cfg.data,
            cfg.augment,
            seed=cfg.run.seed,
            rank=world.rank,
            world=world.size,
            lanes=state.lanes,
            accumulate=sources.accumulate,
            known_bad=bad_log.known,
            pin_memory=world.device.type == "cuda",
        )
        closing.callback(stream.close)
        feed = Feed(
            _shown(
                _batches(cfg, stream, state, world, closing),
                writers,
                cfg.telemetry.images,
            ),
            DeviceTransform(
                cfg.augment, sources.num_classes, cfg.objective.label_smoothing, seed=cfg.run.seed
            ),
            world.device,
            progress,
            accumulate=sources.accumulate,
            on_bad=bad_log.note,
        )
        shape = (cfg.data.image_size, cfg.data.image_size)
        peak = peak_tflops(world.device, cfg.telemetry.peak_tflops, compute_dtype(cfg.precision.compute))
        record = Record(
            state,
            writers,
            cfg.run,
            rollbacks=run_dir.rollbacks,
            autopsy=lambda: autopsy(engine, map(feed.prepare, progress.through(feed.recent, "autopsy"))),
            flops_per_sample=flops.train_flops_per_image(configured(cfg.model), *shape, sources.num_classes),
            peak_flops=peak * 1e12 * world.size if peak else None,
            memory_gib=lambda: memory_gib(world.device),
            max_bad_fraction=cfg.data.max_bad_fraction,
            epoch_samples=sources.train.num_samples,
        )
        run = Run(
            state=state,
            engine=engine,
            ema=ema,
            progress=progress,
            feed=feed,
            bad_log=bad_log,
            schedule=schedule,
            meter=Meter(world, progress, probe),
            record=record,
            stop=stop,
            evaluator=build_evaluator(cfg, sources.evaluation, sources.num_classes, world, progress),
            checkpoints=checkpoints,
            origin=Origin(
                world.size,
                cfg.parallel.engine,
                digest(identity),
                identity,
                {
                    "config": to_dict(cfg),
                    "total_samples": schedule.total_samples,
                    "began": _began(found, run_dir),
                },
            ),
            eval_cfg=cfg.eval,
            batch_size=cfg.data.global_batch,
            accumulate=sources.accumulate,
            steps_per_epoch=steps_per_epoch,
            clip=cfg.optim.clip,
            max_steps=cfg.run.max_steps,
            eval_every=Every(_steps_between(cfg.eval.every_epochs, steps_per_epoch)),
            save_every=Every(cfg.checkpoint.every_steps),
            save_best=cfg.checkpoint.keep_best,
        )
        if run.saves_on_the_way:
            checkpoints.reserve(run.tensors())
        yield run


def build_objective(cfg: Config, num_classes: int) -> Classify:
    """Make the objective on the meta device: an engine, or a checkpoint, gives it memory and values."""
    with torch.device("meta"):
        backbone = create_model(
            cfg.model.name,
            num_classes=num_classes,
            scan_pattern=cfg.model.scan_pattern,
            scan_backend=cfg.model.scan_backend,
            **overrides_of(cfg.model),
        )
        return _OBJECTIVES[cfg.objective.name](backbone, seed=cfg.run.seed)


def build_evaluator(
    cfg: Config, index: Index, num_classes: int, world: World, progress: Progress
) -> ClassificationEvaluator:
    """The evaluator of a split."""
    normalize = Normalize(cfg.augment)

    def batches() -> Iterator[Batch]:
        found = eval_batches(
            index,
            cfg.eval,
            image_size=cfg.data.image_size,
            interpolation=cfg.augment.interpolation,
            rank=world.rank,
            world=world.size,
            workers=cfg.data.workers,
        )
        return progress.through(found, "evaluation")

    return ClassificationEvaluator(
        batches,
        lambda batch, device: normalize(batch.images, device),
        num_samples=index.num_samples,
        world=world,
        compute=compute_dtype(cfg.precision.compute),
    )


def _own(cfg: Config, world: World, closing: ExitStack) -> RunDir:
    """Take the run directory's lock on rank 0, and begin this attempt's log."""
    owned: list[RunDir] = []

    def acquire() -> int:
        owned.append(RunDir.acquire(cfg.run.dir))
        cut_torn_line(owned[0].bad)
        return owned[0].attempt

    attempt = on_main(acquire)
    run_dir = owned[0] if owned else RunDir.attach(cfg.run.dir, attempt)
    closing.callback(run_dir.release)
    closing.enter_context(logging_to(run_dir.log, world.rank))
    return run_dir


def _describe(cfg: Config, run_dir: RunDir, world: World) -> None:
    """Write config.yaml and environment.json; not before the config is known to fit the run's checkpoints."""
    if world.is_main:
        beside = run_dir.config.with_suffix(".tmp")
        beside.write_text(to_yaml(cfg), encoding="utf-8")
        beside.replace(run_dir.config)
        record_environment(run_dir.environment, describe_environment(cfg, world))


def _identity(cfg: Config, sources: Sources) -> dict[str, Any]:
    """Everything that decides what training computes; a resume must match it."""
    identity = trajectory(cfg) | {
        "data.train (content)": sources.train.fingerprint(),
        "num_classes (resolved)": sources.num_classes,
    }
    if cfg.eval.patience:  # then evaluations decide when training ends
        plain = to_dict(cfg)["eval"]
        identity |= {f"eval.{key}": plain[key] for key in ("every_epochs", "metric", "weights", "crop")}
        identity["eval.data (content)"] = sources.evaluation.fingerprint()
    return identity


def _schedule(cfg: ScheduleConfig, optim: OptimConfig, global_batch: int, steps_per_epoch: int) -> Schedule:
    total = total_samples(cfg, global_batch=global_batch, steps_per_epoch=steps_per_epoch)
    return build_schedule(cfg, optim, global_batch=global_batch, total_samples=total)


def _resume(
    cfg: Config,
    checkpoints: Checkpoints,
    identity: dict[str, Any],
    schedule: Schedule,
    steps_per_epoch: int,
) -> Found | None:
    """The checkpoint to go on from: this run's newest whole one, else the one that run.resume names."""
    found = checkpoints.newest()
    if found is not None and cfg.run.resume == "never":
        raise ConfigError(
            f"run.resume=never: {found.path} is there already; use run.resume=auto to go on from it, "
            "or another run.dir"
        )
    if found is None and cfg.run.resume not in ("auto", "never"):
        found = checkpoints.newest(at=Path(cfg.run.resume))
    if found is None:
        return None
    log.info("resuming from %s, saved by %d ranks", found.path, found.meta.world_size)
    before = _saved_schedule(found.meta, cfg, steps_per_epoch)
    ahead = "schedule." if before is not None and schedule.same_until(before, found.meta.samples) else None
    _check_identity(found, identity, ahead=ahead, allowed=cfg.run.allow_changes)
    return found


def _began(found: Found | None, run_dir: RunDir) -> dict[str, Any] | None:
    """The checkpoint of another run that this one began in, None where it began at step 1."""
    if found is None:
        return None
    if found.path.parent == run_dir.checkpoints:
        before: dict[str, Any] | None = found.meta.extra.get("began")
        return before
    return {"checkpoint": str(found.path), "step": found.meta.step}


def _saved_schedule(meta: Meta, cfg: Config, steps_per_epoch: int) -> Schedule | None:
    """The schedule that a checkpoint's run had, on this run's batch and data; None where it cannot be told."""
    saved = {
        key.removeprefix("schedule."): value
        for key, value in meta.trajectory.items()
        if key.startswith("schedule.")
    }
    try:
        return _schedule(ScheduleConfig(**saved), cfg.optim, cfg.data.global_batch, steps_per_epoch)
    except (
        TypeError,
        ConfigError,
    ):  # of another version, or on another batch: its keys are compared one by one
        return None


def _check_identity(found: Found, identity: dict[str, Any], *, ahead: str | None, allowed: bool) -> None:
    """Refuse a config that would leave the checkpoint's trajectory, naming the keys. Raises ConfigError.

    Keys of the group `ahead` differ only in what lies ahead of the checkpoint: they are told and let through.
    """
    saved = found.meta.trajectory
    differs = {
        key: f"{key} was {saved.get(key)!r}, now {identity.get(key)!r}"
        for key in sorted(saved.keys() | identity.keys())
        if saved.get(key) != identity.get(key)
    }
    branched = [change for key, change in differs.items() if ahead and key.startswith(ahead)]
    changed = [change for key, change in differs.items() if not (ahead and key.startswith(ahead))]
    if branched:
        log.info("branching in the constant phase of the schedule: %s", "; ".join(branched))
    if changed and not allowed:
        raise ConfigError(
            f"the config differs from that of {found.path} in what decides the trajectory: {'; '.join(changed)}. "
            "Put it back, use another run.dir, or run.allow_changes=true to go on all the same"
        )
    for change in changed:
        log.warning("run.allow_changes: %s", change)


def _steps_between(epochs: float, steps_per_epoch: int) -> int:
    """The nearest whole number of steps, and at least one; 0 for 0."""
    return max(1, round(epochs * steps_per_epoch)) if epochs else 0


def _writers(
    cfg: Config,
    run_dir: RunDir,
    state: TrainState,
    total_steps: int,
    pace: Pace | None,
    closing: ExitStack,
) -> Writers:
    """Rank 0's outputs, cut to what the loaded checkpoint knows."""
    metrics = closing.enter_context(MetricsLog(run_dir.metrics, after_step=state.step))
    tensorboard = None
    if cfg.telemetry.tensorboard:
        tensorboard = Board(run_dir.tensorboard, after_step=state.step)
        closing.callback(tensorboard.close)
        text = "\n".join(f"    {line}" for line in to_yaml(cfg).splitlines())
        tensorboard.add_text("config", text, state.step)
    bar = closing.enter_context(progress_bar(total_steps))
    return Writers(metrics, tensorboard, bar, pace, cfg.telemetry.log_every_steps, total_steps)


def _batches(
    cfg: Config, stream: TrainStream, state: TrainState, world: World, closing: ExitStack
) -> Iterator[Batch]:
    """The stream's micro-batches from where the run stands; for a GPU, brought there ahead of the step."""
    batches = stream.batches(state.epoch, state.offset, [(a, b) for a, b in state.skipped])
    if world.device.type != "cuda":
        return batches
    ahead = ahead_on_device(stream, batches, cfg.data, cfg.augment.interpolation, world.device)
    closing.callback(ahead.close)
    return ahead


def _shown(batches: Iterator[Batch], writers: Writers | None, count: int) -> Iterator[Batch]:
    """Pass micro-batches on, with the first few augmented images sent to TensorBoard."""
    for first in itertools.islice(batches, 1):
        if writers is not None and writers.tensorboard is not None and count:
            writers.tensorboard.add_images("train/augmented", first.images[:count].cpu().numpy(), first.step)
        yield first
        del first  # else its images would stay on the device as long as the run
    yield from batches
