"""The selective scan under the name, argument order and shapes that users of mamba_ssm know.

Real inputs, and B and C that vary along L, as Mamba-1 has them. What else mamba_ssm's function takes raises an
error that says so. Runs on either backend.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from vmamba_kernels.scan.op import selective_scan


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan u and delta (B, D, L) with A (D, N), B and C (B, N, L) or (B, G, N, L) -> (B, D, L) in u's dtype.

    z (B, D, L) gates the output as y * silu(z). With return_last_state also the state after the last step, (B, D, N) in
    float32 at least: differentiable, N passes over u's size in plain torch.
    Raises ValueError for complex tensors, for B or C without L, and for shapes that do not fit.
    """
    for name, t in (("u", u), ("delta", delta), ("A", A), ("B", B), ("C", C), ("D", D), ("z", z)):
        if t is not None and t.is_complex():
            raise ValueError(f"{name} is complex; only the real selective scan is implemented")
    grouped = []
    for name, t in (("B", B), ("C", C)):
        if t.dim() not in (3, 4):
            raise ValueError(
                f"{name} is {tuple(t.shape)}; it must be (B, N, L) or (B, G, N, L): one that is constant along L, "
                "(D, N), is not implemented; expand it over batch and length"
            )
        grouped.append(t.unsqueeze(1) if t.dim() == 3 else t)
    if z is not None and z.shape != u.shape:
        raise ValueError(f"z is {tuple(z.shape)}; with u {tuple(u.shape)} it must be the same")
    y = selective_scan(u, delta, A, grouped[0], grouped[1], D, delta_bias, delta_softplus, backend=backend)
    if z is not None:
        y = (y * F.silu(z.to(torch.promote_types(z.dtype, torch.float32)))).to(u.dtype)
    if return_last_state:
        return y, _last_state(u, delta, A, grouped[0], delta_bias, delta_softplus)
    return y


def _last_state(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, delta_bias: Tensor | None, delta_softplus: bool
) -> Tensor:
    """Sum what each step leaves at the end: h_L = sum_t exp(A (delta_{t+1} + ... + delta_L)) delta_t B_t u_t."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    batch, width, length = u.shape
    groups, state = B.shape[1:3]
    delta = delta.to(dtype)
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    # Added from the end, where little is left to decay: a difference of long sums would lose those digits.
    rest = F.pad(delta[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)
    drive = (delta * u.to(dtype)).reshape(batch, groups, width // groups, length)
    states = []
    for n in range(state):
        left = torch.exp(A[:, n, None].to(dtype) * rest).reshape(drive.shape)
        states.append((left * drive * B[:, :, n, None].to(dtype)).sum(-1).reshape(batch, width))
    return torch.stack(states, dim=-1)
