"""What stands beside the scan in a block, on rows of channels: norms with a residual sum, GELU, sums."""

from vmamba_kernels.rows.ops import (
    add_branch,
    add_norm,
    add_norm_backward,
    gelu_backward_,
    layer_norm,
    linear_gelu,
    norm,
    norm_backward,
    scale_and_sum,
)

__all__ = [
    "add_branch",
    "add_norm",
    "add_norm_backward",
    "gelu_backward_",
    "layer_norm",
    "linear_gelu",
    "norm",
    "norm_backward",
    "scale_and_sum",
]
