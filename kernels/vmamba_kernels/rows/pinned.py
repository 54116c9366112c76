"""What the kernels on rows are compiled for ahead of time: the widths of VMamba-T's blocks, and one of the largest."""

from collections.abc import Iterator
from typing import Any

from vmamba_kernels.rows.ops import COLUMNS, PROGRAMS, TILE, _product, _product_constants, _tiles
from vmamba_kernels.rows.triton_rows import (
    rows_gelu_backward,
    rows_linear_gelu,
    rows_norm,
    rows_norm_backward,
    rows_scale,
)

Configuration = tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]
WIDTHS = (96, 192, 384, 768, 3072)
FLOAT32 = {"p_w", "p_b", "p_keep", "p_stats", "p_sums", "p_sum", "p_residual"}
NARROW = {"p_branch", "p_dbranch", "p_y", "p_dy", "p_h", "p_dg"}


def pinned() -> list[Configuration]:
    """Return name, kernel, types by argument, constants and options: a float32 stream beside bfloat16 branches."""
    return list(_all())


def _all() -> Iterator[Configuration]:
    for channels in WIDTHS:
        tile, padded, warps = _tiles(channels)
        whole = {"C": channels, "CP": padded, "ROWS": tile}
        for name, stream, flags in (
            ("norm", "fp32", {"BRANCH": False, "KEEP": False, "NORM": True}),
            ("out_norm", "bf16", {"BRANCH": False, "KEEP": False, "NORM": True}),
            ("add_norm", "fp32", {"BRANCH": True, "KEEP": True, "NORM": True}),
            ("add_branch", "fp32", {"BRANCH": True, "KEEP": True, "NORM": False}),
        ):
            yield _one(name, rows_norm, channels, stream, whole | flags, warps)
        walk = whole | {"PROGRAMS": PROGRAMS, "VALUE": True}
        plain = {"RESIDUAL": False, "BRANCH": False, "KEEP": False}
        summed = {"RESIDUAL": True, "BRANCH": True, "KEEP": True}
        yield _one("out_norm", rows_norm_backward, channels, "bf16", walk | plain, warps)
        yield _one("add_norm", rows_norm_backward, channels, "fp32", walk | summed, warps)
        for generation in ("sm_80", "sm_90"):
            yield _one_product(channels, 4 * channels, generation)
    cut = {"C": 384, "COLUMNS": COLUMNS, "ROWS": TILE // COLUMNS, "PROGRAMS": PROGRAMS}
    yield _one("branch", rows_scale, 384, "fp32", cut | {"KEEP": True}, 4)
    yield _one("hidden", rows_gelu_backward, 384, "bf16", cut, 4)


def _one(
    case: str, kernel: Any, channels: int, stream: str, constants: dict[str, Any], warps: int
) -> Configuration:
    types = {name: _type(name, stream) for name in kernel.arg_names if name not in constants}
    return f"{kernel.__name__} {case} C{channels}", kernel, types, constants, {"num_warps": warps}


def _one_product(inner: int, columns: int, generation: str) -> Configuration:
    constants = _product_constants(inner, columns, _product(inner, generation), fast=True)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    types = dict.fromkeys(("p_x", "p_w", "p_b", "p_y"), "*bf16") | {"M": "i32"}
    return f"rows_linear_gelu {generation} C{inner}", rows_linear_gelu, types, constants, options


def _type(name: str, stream: str) -> str:
    if not name.startswith("p_"):
        return "fp32" if name == "eps" else "i32"
    if name in FLOAT32:
        return "*fp32"
    return "*bf16" if name in NARROW else f"*{stream}"
