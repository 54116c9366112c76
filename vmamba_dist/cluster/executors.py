"""Which submitit executor runs a job, and with what.

Law: the executor is named, never guessed: submitit's own choice takes Slurm wherever `srun` is on PATH.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import submitit

from vmamba_dist.config.schema import LaunchConfig


def local_executor(folder: Path, launch: LaunchConfig) -> submitit.LocalExecutor:
    """An executor that starts `launch.tasks` processes here and logs into `folder`."""
    executor = submitit.LocalExecutor(folder=folder)
    limit_s = 60 * launch.time_limit_min
    executor.update_parameters(
        tasks_per_node=launch.tasks,
        timeout_min=launch.time_limit_min,
        signal_delay_s=min(120, limit_s // 5),  # the warning before the end: two steps and a save
    )
    return executor


@contextmanager
def shielded_from_terminal() -> Iterator[None]:
    """Have processes started inside ignore the terminal's Ctrl-C and hang-up (dispositions are inherited)."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
