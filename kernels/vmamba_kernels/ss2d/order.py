"""The four walks over an image as index permutations: which row-major position each step visits.

Directions in the official order: row-major, column-major, and the reverse of each; directions 2 and 3 are the
reversed sequences of 0 and 1. The diagnostic patterns keep four parameter sets and walk rows only.
"""

import torch
from torch import Tensor

PATTERNS = ("cross2d", "unidi", "bidi")


def scan_order(pattern: str, height: int, width: int) -> Tensor:
    """Return (4, L) int64 on the CPU: the row-major index each direction visits at each step; L = height * width.

    Raises ValueError for a pattern that is not one of PATTERNS.
    """
    rows = torch.arange(height * width, device="cpu")
    columns = rows.view(height, width).t().reshape(-1)
    if pattern == "cross2d":
        walks = (rows, columns, rows.flip(0), columns.flip(0))
    elif pattern == "unidi":
        walks = (rows, rows, rows, rows)
    elif pattern == "bidi":
        walks = (rows, rows, rows.flip(0), rows.flip(0))
    else:
        raise ValueError(f"pattern={pattern!r} is unknown; use one of {', '.join(PATTERNS)}")
    return torch.stack(walks)
