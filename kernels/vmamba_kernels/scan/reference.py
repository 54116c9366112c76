"""The definition of the selective scan: one step after another, in the dtype it is given (float32 at least).

    delta_t = softplus(delta_t + bias)
    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t
    y_t = C_t h_t + D u_t

Axes: B batch, K groups, C channels a group, N state, L sequence.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
) -> Tensor:
    """Scan u and delta (B, K*C, L) with A (K*C, N), B and C (B, K, N, L) -> (B, K*C, L), in u's dtype."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    channels = u.shape[1] // B.shape[1]
    u_BDL, delta_BDL, A_DN = u.to(dtype), delta.to(dtype), A.to(dtype)
    B_BDNL = B.to(dtype).repeat_interleave(channels, dim=1)
    C_BDNL = C.to(dtype).repeat_interleave(channels, dim=1)
    if delta_bias is not None:
        delta_BDL = delta_BDL + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        delta_BDL = F.softplus(delta_BDL)
    h_BDN = u_BDL.new_zeros(u.shape[0], *A.shape)
    steps = []
    for t in range(u.shape[-1]):
        delta_BD1 = delta_BDL[..., t, None]
        h_BDN = torch.exp(delta_BD1 * A_DN) * h_BDN + delta_BD1 * B_BDNL[..., t] * u_BDL[..., t, None]
        steps.append((C_BDNL[..., t] * h_BDN).sum(-1))
    y_BDL = torch.stack(steps, dim=-1)
    if D is not None:
        y_BDL = y_BDL + D.to(dtype)[:, None] * u_BDL
    return y_BDL.to(u.dtype)
