"""Parameters and multiply-adds of a variant, in closed form and without torch.

Law: a count follows the shapes that the model computes at that image size, odd feature sizes included.
Convention (the published one): multiply-adds of convolutions, linears and projections; 5 per element of a
LayerNorm; 1 per element pooled; the scan 9·L·D·N + L·D a direction; everything else 0. One GMAC is 1e9.
"""

from __future__ import annotations

from collections.abc import Iterator

from vmamba_dist.models.variants import STRIDE, Variant, check_image_size, dt_rank, get_variant

_K = 4  # scan directions
_NORM = 5  # per element of a LayerNorm
_SCAN = 9  # per step, channel and state


def params(model: str | Variant, num_classes: int = 1000) -> int:
    """Count the parameters of a variant, or of the one named."""
    variant = _variant(model)
    last = variant.dims[-1]
    total = _patch_embed_params(variant) + 2 * last + (last + 1) * num_classes
    for dim, depth in zip(variant.dims, variant.depths, strict=True):
        total += depth * _block_params(variant, dim)
    for dim, following in zip(variant.dims, variant.dims[1:], strict=False):
        if variant.downsample == "v1":
            total += 2 * 4 * dim + 4 * dim * following
        else:
            total += 9 * dim * following + following + 2 * following
    return total


def macs(model: str | Variant, height: int, width: int, num_classes: int = 1000) -> int:
    """Count the multiply-adds of one image's forward; height and width in px, multiples of 4."""
    variant = _variant(model)
    total = _patch_embed_macs(variant, height, width)
    previous = 0
    for dim, depth, (h, w) in zip(
        variant.dims, variant.depths, feature_sizes(variant, height, width), strict=True
    ):
        length = h * w
        if previous:
            total += length * _downsample_macs(variant, previous, dim)
        total += depth * length * _block_macs(variant, dim)
        previous = dim
    return total + previous * length * (_NORM + 1) + previous * num_classes


def train_flops_per_image(model: str | Variant, height: int, width: int, num_classes: int = 1000) -> int:
    """Count the floating-point operations of one image's training step, for MFU.

    A multiply-add is 2 operations and a backward 2 forwards. What activation checkpointing recomputes is not
    counted, as usual for model FLOPs utilisation.
    """
    return 2 * 3 * macs(model, height, width, num_classes)


def feature_sizes(model: str | Variant, height: int, width: int) -> Iterator[tuple[int, int]]:
    """Yield (H, W) of each stage's tokens."""
    check_image_size(height, width)
    h, w = height // STRIDE, width // STRIDE
    for _ in _variant(model).dims:
        yield h, w
        h, w = (h + 1) // 2, (w + 1) // 2


def _variant(model: str | Variant) -> Variant:
    return get_variant(model) if isinstance(model, str) else model


def _patch_embed_params(variant: Variant) -> int:
    dim = variant.dims[0]
    if variant.patch_embed == "v1":
        return 3 * STRIDE**2 * dim + dim + 2 * dim
    half = dim // 2
    return (27 * half + half + 2 * half) + (9 * half * dim + dim + 2 * dim)


def _patch_embed_macs(variant: Variant, height: int, width: int) -> int:
    dim, length = variant.dims[0], (height // STRIDE) * (width // STRIDE)
    if variant.patch_embed == "v1":
        return length * dim * (3 * STRIDE**2 + _NORM)
    half, finer = dim // 2, (height // 2) * (width // 2)
    return finer * half * (27 + _NORM) + length * dim * (9 * half + _NORM)


def _block_params(variant: Variant, dim: int) -> int:
    d, n, r, hidden = variant.inner(dim), variant.d_state, dt_rank(dim), variant.hidden(dim)
    projections = dim * d * (2 if variant.gate else 1) + d * dim
    conv = 9 * d + (d if variant.conv_bias else 0)
    scan = _K * d * ((r + 2 * n) + r + 1 + n + 1)  # x_proj, dt weight and bias, A_logs, Ds
    mlp = 2 * dim + (dim + 1) * hidden + (hidden + 1) * dim if hidden else 0
    return 2 * dim + projections + conv + scan + 2 * d + mlp


def _block_macs(variant: Variant, dim: int) -> int:
    """Multiply-adds a token."""
    d, n, r, hidden = variant.inner(dim), variant.d_state, dt_rank(dim), variant.hidden(dim)
    projections = dim * d * (2 if variant.gate else 1) + d * dim
    scan = _K * d * ((r + 2 * n) + r + _SCAN * n + 1)
    mlp = _NORM * dim + 2 * dim * hidden if hidden else 0
    return _NORM * dim + projections + 9 * d + scan + _NORM * d + mlp


def _downsample_macs(variant: Variant, dim: int, following: int) -> int:
    """Multiply-adds an outgoing token."""
    if variant.downsample == "v1":
        return _NORM * 4 * dim + 4 * dim * following
    return 9 * dim * following + _NORM * following
