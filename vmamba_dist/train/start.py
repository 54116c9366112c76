"""A start of a run, from its config to its outcome."""

from __future__ import annotations

import dataclasses
import gc
import logging

import torch

from vmamba_dist.config.schema import Config
from vmamba_dist.core.dist import World, end_with_parent, launched_by_torchrun, rank_and_size, world
from vmamba_dist.core.precision import be_deterministic
from vmamba_dist.train.assemble import assembled
from vmamba_dist.train.loop import train
from vmamba_dist.train.rollback import RollBack
from vmamba_dist.train.run import Outcome
from vmamba_dist.train.sources import Sources, open_sources
from vmamba_dist.train.stopping import StopRequest

log = logging.getLogger(__name__)


def run(cfg: Config) -> Outcome:
    """Train as `cfg` says, among the processes that the launcher started; resumes by itself.

    Raises ConfigError before any process waits for another where the config, the shards and the world size
    do not fit together.
    """
    if launched_by_torchrun():
        end_with_parent()
    be_deterministic()
    if cfg.precision.threads:
        torch.set_num_threads(cfg.precision.threads)
    sources = open_sources(cfg, rank_and_size()[1])
    with (
        StopRequest().listening() as stop,
        world(cfg.precision.device, cfg.parallel.timeout_s, alone_too=cfg.parallel.engine != "ddp") as place,
    ):
        while (outcome := _attempt(cfg, sources, place, stop)) is None:
            gc.collect()  # what was left behind holds a model's memory
            if cfg.run.resume == "never":  # what is there now is this start's own
                cfg = dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, resume="auto"))
        return outcome


def _attempt(cfg: Config, sources: Sources, place: World, stop: StopRequest) -> Outcome | None:
    """Train from the newest checkpoint on; None where it ended in a roll-back. A collective."""
    try:
        with assembled(cfg, sources, place, stop) as assembled_run:
            if assembled_run.finished:
                log.info("this run is finished: nothing to do (run directory %s)", cfg.run.dir)
                return Outcome.FINISHED
            outcome = train(assembled_run)
            log.info("%s at step %d; run directory %s", outcome.value, assembled_run.state.step, cfg.run.dir)
            return outcome
    except RollBack:
        return None
