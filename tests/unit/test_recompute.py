"""Recomputing changes no bit, keeps less, and a selective one runs no scan twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

import vmamba_kernels.scan.fast
import vmamba_kernels.ss2d.fast
from distributed.world import world
from vmamba_dist.config.schema import ParallelConfig
from vmamba_dist.models.variants import get_variant
from vmamba_dist.models.vmamba import VMamba, create_model
from vmamba_dist.parallel.recompute import apply_recompute

POLICIES = ("off", "selective", "block")
SCANS = {"off": 1, "selective": 1, "block": 2}  # forwards of each scan in a step
MODELS: dict[str, dict[str, Any]] = {
    "with MLP": {},
    "gated, no MLP, 3 states": {
        "mlp_ratio": 0.0,
        "gate": True,
        "d_state": 3,
        "ssm_ratio": 2.0,
        "conv_bias": True,
        "patch_embed": "v1",
        "downsample": "v1",
    },
    "cascade": {"scan_pattern": "cascade"},
}


class _Scans(TorchDispatchMode):
    """Counts the forwards of both scan operations, and the gathers of sharded weights."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.gathers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.vmamba.ss2d_scan.default, torch.ops.vmamba.selective_scan.default)
        self.gathers += func is torch.ops.c10d._allgather_base_.default
        return func(*args, **(kwargs or {}))


def _model(policy: Any, depths: tuple[int, ...] = (1, 2), **options: Any) -> VMamba:
    options = {"dims": (12, 24), "depths": depths, "drop_path_rate": 0.4, "num_classes": 5} | options
    model = create_model("vmamba_atto", scan_backend="torch", **options).train()
    model.init_weights(3)
    apply_recompute(model, policy)
    return model


def _step(model: VMamba, batch: int = 3, side: int = 28, compute: torch.dtype = torch.float32) -> Tensor:
    """Forward and backward with some branches dropped; return the loss."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, side, side - 8, generator=draw)
    keep = torch.bernoulli(torch.full((batch, 2 * model.num_blocks), 0.7), generator=draw) / 0.7
    assert {0.0} < set(keep.flatten().tolist())
    with torch.autocast("cpu", torch.bfloat16, enabled=compute == torch.bfloat16):
        loss = model(images, keep).float().square().mean()
    loss.backward()
    return loss.detach()


def _same(one: VMamba, other: VMamba) -> bool:
    pairs = zip(one.named_parameters(), other.named_parameters(), strict=True)
    return all(p.grad is not None and torch.equal(p.grad, q.grad) for (_, p), (_, q) in pairs)


def test_the_policies_are_the_configs() -> None:
    """What parallel.recompute offers is what is tested here."""
    assert set(get_args(get_type_hints(ParallelConfig)["recompute"])) == set(POLICIES)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_no_bit_changes_and_selective_runs_each_scan_once(
    options: dict[str, Any], compute: torch.dtype
) -> None:
    plain = _model("off", **options)
    loss = _step(plain, compute=compute)
    once = None
    for policy in POLICIES:
        model = _model(policy, **options)
        with _Scans() as scans:
            assert torch.equal(_step(model, compute=compute), loss)
        assert _same(model, plain)
        once = once or scans.count
        assert scans.count == SCANS[policy] * once
    assert once is not None
    assert once >= plain.num_blocks


def test_peak_memory_falls() -> None:
    """Bytes of all live tensors at the worst moment of a step, counted as they come and go."""
    peaks = {}
    for policy in POLICIES:
        model = _model(policy, depths=(3, 3), dims=(16, 32))
        tracker = MemTracker()
        tracker.track_external(model)
        with tracker:
            _step(model, batch=4, side=128)
        peaks[policy] = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert peaks["block"] < 0.9 * peaks["selective"]
    assert peaks["selective"] < 0.9 * peaks["off"]


@pytest.mark.parametrize("options", [{}, {"patch_embed": "v1"}], ids=["two convolutions", "one"])
def test_the_stem_is_run_again_under_block_and_keeps_nothing_but_the_images(options: dict[str, Any]) -> None:
    """Not even a copy of them, though its convolution wants another layout."""
    names = list(_model("off", **options).state_dict())
    for policy, runs in {"off": 1, "selective": 1, "block": 2}.items():
        model = _model(policy, **options)
        assert list(model.state_dict()) == names
        ran: list[int] = []
        model.patch_embed[0].register_forward_hook(lambda *_, ran=ran: ran.append(1))
        images = torch.zeros(2, 3, 64, 64)
        tracker = MemTracker()
        tracker.track_external(model, images)

        def live(tracker: MemTracker = tracker) -> int:
            return tracker.get_tracker_snapshot("current")[torch.device("cpu")]["Total"]

        with tracker:
            before = live()
            tokens = model.patch_embed(images)
            kept = live() - before - tokens.nbytes
            tokens.sum().backward()
        assert (kept == 0) == (policy == "block")
        assert len(ran) == runs


def test_without_gradients_nothing_is_run_twice() -> None:
    model = _model("selective")
    with torch.no_grad(), _Scans() as scans:
        model(torch.zeros(2, 3, 16, 16), torch.ones(2, 2 * model.num_blocks))
    assert scans.count == model.num_blocks


def test_the_policy_is_what_was_set_last_and_timm_sees_it() -> None:
    model = _model("selective")
    assert model.grad_checkpointing
    model.set_grad_checkpointing()
    assert model.grad_checkpointing
    with _Scans() as scans:
        _step(model)
    assert scans.count == 2 * model.num_blocks
    assert model.patch_embed.recompute is not None
    model.set_grad_checkpointing(False)
    assert not model.grad_checkpointing
    assert model.patch_embed.recompute is None
    apply_recompute(model, "block")
    assert model.grad_checkpointing
    assert model.patch_embed.recompute is not None
    apply_recompute(model, "off")
    assert not model.grad_checkpointing
    assert model.patch_embed.recompute is None


@contextmanager
def _counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Count the scans that run, whoever calls them: inside a compiled block no dispatch mode sees them."""
    calls = [0]

    def counted(run: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any) -> Any:
            calls[0] += 1
            return run(*args)

        return forward

    with monkeypatch.context() as patch:
        for module in (vmamba_kernels.ss2d.fast, vmamba_kernels.scan.fast):
            patch.setattr(module, "forward", counted(module.forward))
        yield calls


# torch's own, while it traces a block whose input is another block's output.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("policy", POLICIES)
def test_compiled_blocks_recompute_alike(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recompute, then compile: the compiled block holds the recomputation."""
    plain = _model("off")
    loss = _step(plain)
    model = _model(policy)
    for block in model.blocks():
        block.compile(dynamic=False, backend="aot_eager", fullgraph=True)
    with _counting(monkeypatch) as calls:
        torch.testing.assert_close(_step(model), loss)
    assert calls[0] == SCANS[policy] * model.num_blocks
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def sharded_step(policy: str) -> tuple[float, list[bytes], int, int]:
    """On a rank: the loss, its shards of the gradients, the scans run and gathers made, with every block sharded."""
    model = _model(policy)
    for block in model.blocks():
        fully_shard(block)
    fully_shard(model)
    with _Scans() as scans:
        loss = _step(model)
    grads = [p.grad.to_local().numpy().tobytes() for p in model.parameters() if p.grad is not None]
    return float(loss), grads, scans.count, scans.gathers


@pytest.mark.distributed
def test_sharded_blocks_recompute_alike() -> None:
    """Recompute, then shard: no bit changes, scans are counted as without sharding, and nothing is gathered anew."""
    plain = world(2).run(sharded_step, "off")
    for policy in POLICIES:
        for (loss, grads, count, gathers), (loss_off, grads_off, once, gathers_off) in zip(
            world(2).run(sharded_step, policy), plain, strict=True
        ):
            assert loss == loss_off
            assert grads == grads_off
            assert len(grads) > 20
            assert count == SCANS[policy] * once
            assert gathers == gathers_off > 0


def test_every_model_has_blocks_to_recompute() -> None:
    with torch.device("meta"):
        model = create_model("vmamba_tiny_s1l8")
    assert len(list(model.blocks())) == get_variant("vmamba_tiny_s1l8").num_blocks
