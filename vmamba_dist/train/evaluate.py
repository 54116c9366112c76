"""`vmamba eval eval.checkpoint=… eval.data=…`: what a checkpoint is worth on a split, every sample once."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import torch

from vmamba_dist.checkpoint.save import find, load
from vmamba_dist.config import ConfigError, UserError
from vmamba_dist.config import load as load_config
from vmamba_dist.core.dist import World, end_with_parent, launched_by_torchrun, world
from vmamba_dist.core.precision import be_deterministic
from vmamba_dist.core.state import TrainState
from vmamba_dist.train.assemble import build_evaluator, build_objective
from vmamba_dist.train.progress import Progress
from vmamba_dist.train.sources import open_evaluation


def evaluate(args: Sequence[str], place: World) -> dict[str, float | str]:
    """Evaluate the checkpoint of `eval.checkpoint`; its own config holds but for the words in `args`. A collective.

    Returns {checkpoint, weights, split, step, top1, top5 (in %), loss, num_samples}. Raises ConfigError or
    CheckpointError.
    """
    named = load_config(args).eval.checkpoint
    if not named:
        raise ConfigError(
            "eval.checkpoint is not set: give a checkpoint, or a run directory for its newest one"
        )
    found = find(named, place)
    cfg = load_config(args, base=found.meta.extra["config"])
    num_classes = int(found.meta.trajectory["num_classes (resolved)"])
    index = open_evaluation(cfg, num_classes)
    if cfg.precision.threads:
        torch.set_num_threads(cfg.precision.threads)
    be_deterministic()  # as in training, so that the figures are the same
    weights = cfg.eval.weights if cfg.ema.enabled else "raw"
    prefix = "ema." if weights == "ema" else "model."
    objective = build_objective(cfg, num_classes)
    objective.to_empty(device=place.device)
    tensors = {prefix + name: tensor for name, tensor in objective.state_dict().items()}
    unused = tuple({"ema.", "model.", "optim."} - {prefix})
    load(found, tensors, place, allow_unused=unused)
    state = TrainState()
    state.load_dict(found.meta.state)
    result = build_evaluator(cfg, index, num_classes, place, Progress(place.device))(objective, state)
    return {
        "checkpoint": str(found.path),
        "weights": weights,
        "split": index.split,
        "step": state.step,
        **result,
    }


def main(args: Sequence[str]) -> int:
    """Evaluate and print one line of JSON, from rank 0; 2 where the words or the checkpoint are at fault."""
    if launched_by_torchrun():
        end_with_parent()
    try:
        cfg = load_config(args)
        with world(cfg.precision.device, cfg.parallel.timeout_s) as place:
            result = evaluate(args, place)
            if place.is_main:
                print(json.dumps(result))
    except UserError as error:
        print(f"vmamba: {error}", file=sys.stderr)
        return 2
    return 0
