"""Initial values in parts, and models that lack some: neither starts otherwise than whole ones do."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from vmamba_dist.config.schema import OptimConfig, ParallelConfig, PrecisionConfig
from vmamba_dist.core.dist import World
from vmamba_dist.models import create_model, init
from vmamba_dist.models.init import Init, init_rows, init_tensor
from vmamba_dist.objectives.classify import Classify
from vmamba_dist.parallel.materialise import initialise, materialise
from vmamba_dist.parallel.plan import parallelize

CPU = torch.device("cpu")
RULES = [
    Init("constant", 0.3),
    Init("normal", 0.02),
    Init("uniform", 0.5),
    Init("states"),
    Init("time_step"),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
@pytest.mark.parametrize("shape", [(7, 3), (13,), (5, 1, 3, 3), (1, 9)], ids=str)
def test_rows_are_those_of_the_whole(rule: Init, shape: tuple[int, ...], monkeypatch: Any) -> None:
    """Drawn in pieces of a row, of some, and at once; a share may be empty."""
    if rule.kind == "states":
        shape = (*shape, 4)
    whole = init_tensor("name", shape, 3, rule)
    for piece in (1, 13, 1 << 20):
        monkeypatch.setattr(init, "_PIECE", piece)
        for ranks in (1, 2, 3, 5):
            each = -(-shape[0] // ranks)
            cuts = [min(rank * each, shape[0]) for rank in range(ranks + 1)]
            parts = [init_rows("name", shape, 3, rule, a, b) for a, b in pairwise(cuts)]
            assert [len(part) for part in parts] == [b - a for a, b in pairwise(cuts)]
            assert torch.equal(torch.cat(parts), whole)


def test_drawing_in_pieces_keeps_the_values_that_drawing_at_once_gives() -> None:
    values = init_tensor("name", (1 << 11, 1 << 10), 0, Init("normal", 1.0))
    draw = init.generator(0, "init", "name")
    assert values.flatten().tolist() == draw.standard_normal(1 << 21, "float32").tolist()


def _objective() -> Classify:
    with torch.device("meta"):
        return Classify(create_model("vmamba_atto", num_classes=3), seed=0)


def _start(objective: Classify) -> None:
    parallelize(
        objective,
        parallel=ParallelConfig(),
        precision=PrecisionConfig(),
        optim=OptimConfig(),
        world=World(0, 1, 0, CPU),
        seed=0,
    )


def test_a_parameter_that_nothing_fills_is_named_and_nothing_starts() -> None:
    objective = _objective()
    objective.register_parameter("temperature", nn.Parameter(torch.empty(1, device="meta")))
    with pytest.raises(RuntimeError, match=r"^temperature was given memory and no values"):
        _start(objective)


def test_a_module_without_a_rule_is_named_and_nothing_starts() -> None:
    objective = _objective()
    objective.backbone.classifier.add_module("extra", nn.PReLU(device="meta"))
    with pytest.raises(TypeError, match="PReLU has parameters but no rule"):
        _start(objective)
    objective = _objective()
    scan = next(objective.backbone.blocks()).op
    scan.register_parameter("gamma", nn.Parameter(torch.empty(1, device="meta")))
    with pytest.raises(TypeError, match=r"layers\.0\.blocks\.0\.op\.gamma: SS2D has no rule"):
        _start(objective)


def test_a_parameter_left_on_the_meta_device_is_named() -> None:
    objective = _objective()
    with pytest.raises(ValueError, match=r"patch_embed\.0\.weight is on the meta device"):
        initialise(objective, 0)
    materialise(objective, CPU)
    objective.register_parameter("late", nn.Parameter(torch.empty(1, device="meta")))
    with pytest.raises(RuntimeError, match=r"^late is on the meta device: it was never given memory"):
        initialise(objective, 0)


def test_materialised_and_initialised_is_the_model_built_at_once() -> None:
    objective, whole = _objective(), create_model("vmamba_atto", num_classes=3)
    materialise(objective, CPU)
    initialise(objective, 7)
    whole.init_weights(7)
    assert all(torch.equal(t, whole.state_dict()[n]) for n, t in objective.backbone.state_dict().items())
