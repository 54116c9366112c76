"""What the fused scan is compared with: the same span with its four scans materialised, and the official model's.

Law: each span begins at the depthwise convolution's output and ends at out_norm's input, with the same parameters.
Of the official model only its public parts are called, from a checkout that the user names.

Axes: B batch, H W image, L = H*W, K = 4 directions, C channels, N state, R dt rank, P = R + 2N.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import vmamba_dist.models.ss2d
import vmamba_dist.models.vmamba
from vmamba_dist.models import fused as block
from vmamba_kernels import selective_scan
from vmamba_kernels.backend import backend_for
from vmamba_kernels.testing import ImageShape

K = 4


@dataclass
class Weights:
    """The float32 parameters of one span, as SS2D holds them: all are leaves."""

    x_proj: Tensor  # (K * P, C)
    dt: Tensor  # (K, C, R)
    dt_bias: Tensor  # (K, C)
    a_log: Tensor  # (K * C, N)
    skip: Tensor  # (K * C)

    @classmethod
    def drawn(cls, shape: ImageShape, device: torch.device) -> "Weights":
        """Draw them as a new model's: time steps between 0.001 and 0.1, A = -1 … -N, D = 1."""
        c, r, n = shape.channels, shape.rank, shape.state

        def uniform(*size: int) -> Tensor:
            return 2 * torch.rand(size, device=device) - 1

        step = 10 ** (1.0 * uniform(K, c) - 2)
        a = torch.arange(1.0, n + 1, device=device).repeat(K * c, 1)
        drawn = cls(
            x_proj=c**-0.5 * uniform(K * (r + 2 * n), c),
            dt=r**-0.5 * uniform(K, c, r),
            dt_bias=step + torch.log(-torch.expm1(-step)),
            a_log=a.log(),
            skip=torch.ones(K * c, device=device),
        )
        for leaf in drawn.leaves():
            leaf.requires_grad_()
        return drawn

    def leaves(self) -> list[Tensor]:
        return [self.x_proj, self.dt, self.dt_bias, self.a_log, self.skip]


class _Core(torch.autograd.Function):
    """The span as a block of the model runs it on a GPU, in its one autograd node (vmamba_dist/models/fused.py)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: block.Plan, *weights: Tensor) -> Tensor:
        w = block.made(block.Core(*weights), plan, x.dtype)
        y, projected, states = block.core(x, plan, w, save=True)
        ctx.plan = plan
        ctx.save_for_backward(x, projected, states, *w)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, projected, states, *w = ctx.saved_tensors
        dx, found = block.core_backward(dy, x, projected, states, ctx.plan, block.Core(*w), torch.float32)
        return dx, None, *found


def fused(x_BHWC: Tensor, w: Weights, backend: str) -> Tensor:
    """Run the span as the model's blocks do: one projection of the tokens as they lie, one scan → (B, H, W, C)."""
    plan = block.Plan(0.0, "cross2d", backend_for(backend, x_BHWC))
    with torch.autocast(x_BHWC.device.type, enabled=False):
        y: Tensor = _Core.apply(x_BHWC, plan, w.x_proj, w.dt, w.dt_bias, w.a_log, w.skip)
    return y


def materialised(x_BHWC: Tensor, w: Weights, backend: str, wide: bool = False) -> Tensor:
    """Run the span over four permuted copies of the tokens, each projected → (B, H, W, C).

    `wide` hands the scan's outputs on in float32, as the official kernel does.
    """
    x_BKCL = _cross_scan(x_BHWC)
    channels = x_BHWC.shape[3]
    projected_BKPL = torch.matmul(w.x_proj.view(K, -1, channels), x_BKCL)
    y_BKCL = _scan(x_BKCL, projected_BKPL, w.dt, w.dt_bias, -torch.exp(w.a_log), w.skip, backend)
    return _cross_merge(y_BKCL.float() if wide else y_BKCL, x_BHWC.shape)


def materialised_scan(
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    *,
    pattern: str = "cross2d",
    backend: str = "auto",
) -> Tensor:
    """Do what ss2d_scan does, and take what it takes, over four permuted copies; cross2d alone."""
    assert pattern == "cross2d", pattern
    # The models pad a direction's columns to a multiple of 8.
    p_BHWKP = projected.unflatten(3, (K, -1))[..., : dt_weight.shape[2] + 2 * A.shape[1]]
    walks = (_rows(p_BHWKP[..., 0, :]), _columns(p_BHWKP[..., 1, :]))
    turned = (_rows(p_BHWKP[..., 2, :]).flip(-1), _columns(p_BHWKP[..., 3, :]).flip(-1))
    projected_BKPL = torch.stack((*walks, *turned), dim=1)
    y_BKCL = _scan(_cross_scan(x), projected_BKPL, dt_weight, dt_bias, A, D, backend)
    return _cross_merge(y_BKCL, x.shape)


@contextmanager
def materialising_model() -> Iterator[None]:
    """Let every SS2D run its scan through `materialised_scan`, in blocks that are composed of their modules."""
    with (
        patch.object(vmamba_dist.models.ss2d, "ss2d_scan", materialised_scan),
        patch.object(vmamba_dist.models.vmamba.Block, "_fuses", lambda *_: False),
    ):
        yield


def _rows(x_BHWC: Tensor) -> Tensor:
    return x_BHWC.permute(0, 3, 1, 2).flatten(2)


def _columns(x_BHWC: Tensor) -> Tensor:
    return x_BHWC.permute(0, 3, 2, 1).flatten(2)


def _cross_scan(x_BHWC: Tensor) -> Tensor:
    forwards = torch.stack((_rows(x_BHWC), _columns(x_BHWC)), dim=1)
    return torch.cat((forwards, forwards.flip(-1)), dim=1)


def _cross_merge(y_BKCL: Tensor, image: torch.Size) -> Tensor:
    batch, height, width, channels = image
    both = y_BKCL[:, :2] + y_BKCL[:, 2:].flip(-1)
    rows = both[:, 0].view(batch, channels, height, width)
    columns = both[:, 1].view(batch, channels, width, height).transpose(2, 3)
    return (rows + columns).permute(0, 2, 3, 1).contiguous()


def _scan(
    x_BKCL: Tensor,
    projected_BKPL: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    backend: str,
) -> Tensor:
    rank, state = dt_weight.shape[2], A.shape[1]
    dt_BKRL, b_BKNL, c_BKNL = torch.split(projected_BKPL, [rank, state, state], dim=2)
    delta_BKCL = torch.matmul(dt_weight, dt_BKRL)
    with torch.autocast(x_BKCL.device.type, enabled=False):
        y = selective_scan(
            x_BKCL.flatten(1, 2),
            delta_BKCL.flatten(1, 2),
            A,
            b_BKNL,
            c_BKNL,
            D,
            dt_bias.flatten(),
            backend=backend,
        )
    return y.view_as(x_BKCL)


class Official:
    """An official checkout whose CUDA extension imports: its SS2D's span, and its model."""

    def __init__(self, checkout: Path) -> None:
        """Import it. Raises ImportError where it, or its extension, cannot be."""
        sys.path[:0] = [
            str(checkout / "classification" / "models"),
            str(checkout / "kernels" / "selective_scan"),
        ]
        importlib.import_module("selective_scan_cuda_oflex")
        self._vmamba: ModuleType = importlib.import_module("vmamba")

    def span(self, shape: ImageShape, w: Weights) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
        """Return the span (B, C, H, W) → (B, C, H, W) of the model's final form with w's values, and its leaves."""
        module = self._vmamba.SS2D(
            d_model=shape.channels,
            d_state=shape.state,
            ssm_ratio=1.0,
            dt_rank=shape.rank,
            conv_bias=False,
            forward_type="v05_noz",
            channel_first=True,
        ).to(w.dt.device)
        module.out_norm = _End()
        leaves = [
            module.x_proj_weight,
            module.dt_projs_weight,
            module.dt_projs_bias,
            module.A_logs,
            module.Ds,
        ]
        with torch.no_grad():
            for leaf, value in zip(leaves, w.leaves(), strict=True):
                leaf.copy_(value.view(leaf.shape))
        return module.forward_core, leaves

    def model(self) -> nn.Module:
        """Build its VMamba-T (s1l8) without drop path."""
        model: nn.Module = self._vmamba.vmamba_tiny_s1l8()
        for module in model.modules():
            if hasattr(module, "drop_prob"):
                module.drop_prob = 0.0
        return model


class _End(nn.Module):
    """Stands where out_norm does: the span's value goes past the cast that follows the norm."""

    def forward(self, y: Tensor) -> "_Reached":
        return _Reached(y)


@dataclass
class _Reached:
    y: Tensor

    def to(self, dtype: torch.dtype) -> Tensor:
        return self.y
