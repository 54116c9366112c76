"""`torchrun … -m vmamba_dist.train config=… key=value`: one process of a run."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vmamba_dist.config import UserError, load
from vmamba_dist.train import run


def main(args: Sequence[str]) -> int:
    """Train, and return the exit code: 0 done or paused, 75 stopped and saved, 2 a mistake that the user can mend."""
    try:
        return run(load(args)).exit_code
    except UserError as error:
        print(f"vmamba: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
