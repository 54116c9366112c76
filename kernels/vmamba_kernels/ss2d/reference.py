"""The definition of the four-direction scan: permute by scan_order, scan each sequence, put back, add.

Axes: B batch, H W image, L = H*W, K = 4 directions, C channels, N state, R dt rank.
"""

import torch
from torch import Tensor

from vmamba_kernels.scan.reference import selective_scan_reference
from vmamba_kernels.ss2d.order import scan_order


def ss2d_scan_reference(
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    *,
    pattern: str = "cross2d",
) -> Tensor:
    """Scan x (B, H, W, C) in four directions and add -> (B, H, W, C) in x's dtype; arguments as ss2d_scan's."""
    batch, height, width, channels = x.shape
    rank, state = dt_weight.shape[2], A.shape[1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    order_KL = scan_order(pattern, height, width).to(x.device)
    x_BLC = x.to(dtype).reshape(batch, height * width, channels)
    p_BLKP = projected.to(dtype).reshape(batch, height * width, 4, rank + 2 * state)
    x_BKCL = torch.stack([x_BLC[:, order_KL[k]] for k in range(4)], 1).transpose(2, 3)
    p_BKPL = torch.stack([p_BLKP[:, order_KL[k], k] for k in range(4)], 1).transpose(2, 3)
    dt_BKRL, B_BKNL, C_BKNL = torch.split(p_BKPL, [rank, state, state], dim=2)
    delta_BKCL = dt_weight.to(dtype) @ dt_BKRL
    y_BDL = selective_scan_reference(
        x_BKCL.flatten(1, 2), delta_BKCL.flatten(1, 2), A, B_BKNL, C_BKNL, D, dt_bias.flatten()
    )
    y_BKLC = y_BDL.view(batch, 4, channels, height * width).transpose(2, 3)
    y_BLC = torch.stack([y_BKLC[:, k, order_KL[k].argsort()] for k in range(4)]).sum(0)
    return y_BLC.view(x.shape).to(x.dtype)
