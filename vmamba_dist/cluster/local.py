"""`vmamba train`: become the training process, or run several as a followed job.

Law: nothing is added to `python -m vmamba_dist.train …`; it is the same run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from vmamba_dist.cluster import env, submit


def main(words: Sequence[str]) -> int:
    """Train here with `launch.tasks_per_node` processes; return 0, 75 (stopped and saved), 2 (misused) or 1."""
    intent = submit.plan("train", words)
    if intent.config.launch.tasks == 1 or env.under_launcher():
        device = f"precision.device={intent.config.precision.device}"  # launch.gpus_per_node asks for cuda
        os.execv(sys.executable, [sys.executable, "-m", "vmamba_dist.train", *words, device])
    return submit.run_as_job(intent, follow=True)
