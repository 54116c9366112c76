"""`vmamba train`: become the training process, or the torchrun that starts several.

Law: nothing is added to `python -m vmamba_dist.train …`; it is the same run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from vmamba_dist.cluster import env
from vmamba_dist.config import Config, load


def command(config: Config, words: Sequence[str]) -> list[str]:
    """The command line that trains with `launch.tasks` processes on this machine."""
    launcher: list[str] = []
    if config.launch.tasks > 1 and not env.under_launcher():
        launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={config.launch.tasks}", "-m"]
    return [sys.executable, "-m", *launcher, "vmamba_dist.train", *words]


def main(words: Sequence[str]) -> int:
    """Check the config, then replace this process by the training."""
    config = load(words)
    if config.launch.tasks > 1:
        env.share_threads(config.launch.tasks)
    line = command(config, words)
    sys.stdout.flush()
    os.execv(line[0], line)
