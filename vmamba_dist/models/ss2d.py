"""SS2D: the four-direction selective scan over an image, with its projections, channel-last.

Law: one implementation for both official layouts and for gated (v0) and plain (v05_noz) blocks; tokens stay
(B, H, W, C) and are never permuted, because the projection commutes with the order of the scan. The
recurrence (A, D, time-step bias, state) and out_norm compute in float32 or wider under every precision.
Parameters of official shape (4, ., .) are stored folded as (4 * ., .): sharding splits dim 0.

Shapes: B batch, H W feature size, C width, D inner channels, N states, R time-step rank, K = 4 directions.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmamba_dist.models.variants import dt_rank
from vmamba_kernels import resolve_backend, rows, selective_scan, ss2d_scan
from vmamba_kernels.ss2d.tiles import padded

K = 4
LN_EPS = 1e-5

ScanPattern = Literal["cross2d", "unidi", "bidi", "cascade"]
ScanBackend = Literal["auto", "triton", "torch"]


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last dim, in the wider of the input's and the parameters' precision.

    `backend` is the scan's: whoever asks for torch gets torch's own norm too.
    """

    def __init__(self, dim: int, backend: ScanBackend = "auto") -> None:
        super().__init__(dim, eps=LN_EPS)
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        # Autocast does this on CUDA only; the residual stream must have one precision on every device.
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        if self._by_rows(x, dtype):
            return rows.layer_norm(x, self.weight, self.bias, self.eps, dtype)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        return F.layer_norm(x.to(dtype), self.normalized_shape, weight, bias, self.eps)

    def _by_rows(self, x: Tensor, dtype: torch.dtype) -> bool:
        """On CUDA our own: PyTorch's is slow on short rows, and wants a float32 copy of a bfloat16 input."""
        ours = x.is_cuda and self.backend != "torch"
        return ours and dtype == torch.float32 and not torch.compiler.is_compiling()


class Permute(nn.Module):
    """Reorder dims; no copy."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.dims)

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.dims))


def to_channels_first() -> Permute:
    """(B, H, W, C) → (B, C, H, W)."""
    return Permute(0, 3, 1, 2)


def to_channels_last() -> Permute:
    """(B, C, H, W) → (B, H, W, C)."""
    return Permute(0, 2, 3, 1)


class SS2D(nn.Module):
    """Mix the tokens of an image: (B, H, W, C) → (B, H, W, C).

    `scan_pattern`: cross2d (rows and columns, both senses), unidi (rows, four times), bidi (rows in both
    senses, twice), cascade (each row on its own, then each column).
    """

    def __init__(
        self,
        dim: int,
        *,
        ssm_ratio: float = 1.0,
        d_state: int = 1,
        gate: bool = False,
        conv_bias: bool = False,
        scan_pattern: ScanPattern = "cross2d",
        scan_backend: ScanBackend = "auto",
    ) -> None:
        super().__init__()
        if scan_pattern not in get_args(ScanPattern):
            raise ValueError(f"scan_pattern={scan_pattern!r}: use one of {', '.join(get_args(ScanPattern))}")
        if scan_backend not in get_args(ScanBackend):
            raise ValueError(f"scan_backend={scan_backend!r}: use one of {', '.join(get_args(ScanBackend))}")
        if scan_backend == "triton":
            resolve_backend(scan_backend, "cuda" if torch.cuda.is_available() else "cpu")
        self.inner = int(ssm_ratio * dim)
        self.d_state = d_state
        self.dt_rank = dt_rank(dim)
        self.gate = gate
        self.scan_pattern = scan_pattern
        self.scan_backend = scan_backend

        d, n, r = self.inner, d_state, self.dt_rank
        self.x_proj_weight = nn.Parameter(torch.empty(K * (r + 2 * n), d))
        self.A_logs = nn.Parameter(torch.empty(K * d, n))
        self.Ds = nn.Parameter(torch.empty(K * d))
        self.dt_projs_weight = nn.Parameter(torch.empty(K * d, r))
        self.dt_projs_bias = nn.Parameter(torch.empty(K * d))
        self.out_norm = LayerNorm(d, scan_backend)
        self.in_proj = nn.Linear(dim, 2 * d if gate else d, bias=False)
        self.conv2d = nn.Conv2d(d, d, kernel_size=3, padding=1, groups=d, bias=conv_bias)
        self.out_proj = nn.Linear(d, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mix (B, H, W, C) tokens."""
        u_BHWD = self.in_proj(x)
        if self.gate:
            u_BHWD, z_BHWD = u_BHWD.chunk(2, dim=-1)
        u_BHWD = self.conv2d(u_BHWD.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        u_BHWD = F.silu(u_BHWD)
        y_BHWD = self._cascade(u_BHWD) if self.scan_pattern == "cascade" else self._scan(u_BHWD)
        y_BHWD = self.out_norm(at_least_float32(y_BHWD)).to(u_BHWD.dtype)
        if self.gate:
            y_BHWD = y_BHWD * F.silu(z_BHWD)
        out_BHWC: Tensor = self.out_proj(y_BHWD)
        return out_BHWC

    def _recurrence(self) -> tuple[Tensor, Tensor, Tensor]:
        """The time-step bias (4D), A (4D, N) and D (4D) of the scan, in float32 or wider."""
        a_log, skip, bias = map(at_least_float32, (self.A_logs, self.Ds, self.dt_projs_bias))
        return bias, -torch.exp(a_log), skip

    def _aligned_x_proj(self, device: torch.device) -> Tensor:
        """The projection's weight; for the kernels with rows of zeros, so that each direction begins at 16 bytes."""
        width = self.dt_rank + 2 * self.d_state
        filling = padded(width) - width
        if filling == 0 or resolve_backend(self.scan_backend, device) == "torch":
            return self.x_proj_weight
        weight = self.x_proj_weight.view(K, width, self.inner)
        return F.pad(weight, (0, 0, 0, filling)).flatten(0, 1)

    def _scan(self, u_BHWD: Tensor) -> Tensor:
        projected = F.linear(u_BHWD, self._aligned_x_proj(u_BHWD.device))
        with torch.autocast(u_BHWD.device.type, enabled=False):
            bias, a, skip = self._recurrence()
            dt_weight = self.dt_projs_weight.to(u_BHWD.dtype).view(K, self.inner, self.dt_rank)
            return ss2d_scan(
                u_BHWD,
                projected,
                dt_weight,
                bias.view(K, self.inner),
                a,
                skip,
                pattern=self.scan_pattern,
                backend=self.scan_backend,
            )

    def _cascade(self, u_BHWD: Tensor) -> Tensor:
        """Scan every row on its own with directions 0 and 1, then every column with 2 and 3."""
        rows_BHWD = self._scan_lines(self._plain_norm(u_BHWD), first=0)
        columns_BWHD = self._plain_norm(rows_BHWD).transpose(1, 2)
        return self._scan_lines(columns_BWHD, first=2).transpose(1, 2)

    def _plain_norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(at_least_float32(x), (self.inner,), eps=LN_EPS).to(x.dtype)

    def _scan_lines(self, u_BGLD: Tensor, first: int) -> Tensor:
        """Scan the G lines of length L, each on its own, in direction `first` and backwards in the next.

        The backward output is added without being turned back: so do the official code and its checkpoints.
        """
        batch, lines, length, d = u_BGLD.shape
        r, n, pair = self.dt_rank, self.d_state, slice(first, first + 2)
        weight = self.x_proj_weight.view(K, r + 2 * n, d)[pair].flatten(0, 1)
        projected = F.linear(u_BGLD, weight).reshape(batch * lines, length, 2, r + 2 * n)
        u_MLD = u_BGLD.reshape(batch * lines, length, d)
        u_MKLD = torch.stack((u_MLD, u_MLD.flip(1)), dim=1)
        p_MKLP = torch.stack((projected[:, :, 0], projected[:, :, 1].flip(1)), dim=1)
        dt_MKLR, b_MKLN, c_MKLN = p_MKLP[..., :r], p_MKLP[..., r : r + n], p_MKLP[..., r + n :]
        delta_MKLD = torch.matmul(dt_MKLR, self.dt_projs_weight.view(K, d, r)[pair].transpose(1, 2))
        with torch.autocast(u_BGLD.device.type, enabled=False):
            bias, a, skip = (p.view(K, d, -1)[pair].flatten(0, 1) for p in self._recurrence())
            y = selective_scan(
                u_MKLD.transpose(2, 3).flatten(1, 2),
                delta_MKLD.to(u_MKLD.dtype).transpose(2, 3).flatten(1, 2),
                a,
                b_MKLN.transpose(2, 3),
                c_MKLN.transpose(2, 3),
                skip.flatten(),
                bias.flatten(),
                delta_softplus=True,
                backend=self.scan_backend,
            )
        y_MKDL = y.view(batch * lines, 2, d, length)
        return y_MKDL.sum(dim=1).transpose(1, 2).reshape(batch, lines, length, d)


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32 or the wider precision that it has."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
