"""Which submitit executor runs a job, and with what.

Law: the executor is named, never guessed: submitit's own choice takes Slurm wherever `srun` is on PATH.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import submitit

from vmamba_dist.config.schema import LaunchConfig

_NO_LIMIT_MIN = 10 * 365 * 24 * 60  # submitit wants a number


def local_executor(folder: Path, launch: LaunchConfig) -> submitit.LocalExecutor:
    """An executor that starts `launch.tasks` processes here and logs into `folder`."""
    executor = submitit.LocalExecutor(folder=folder)
    limit_min = launch.time_limit_min or _NO_LIMIT_MIN
    executor.update_parameters(
        nodes=launch.nodes,
        tasks_per_node=launch.tasks,
        timeout_min=limit_min,
        signal_delay_s=min(120, 60 * limit_min // 5),  # the warning before the end: two steps and a save
    )
    return executor


@contextmanager
def apart_from_terminal(log: Path) -> Iterator[None]:
    """Have processes started inside ignore Ctrl-C and hang-up, read nothing and write to `log`.

    They inherit dispositions and descriptors; with ours they would end with the terminal, or keep a pipe open
    that somebody reads to its end.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    ours = [os.dup(descriptor) for descriptor in range(3)]
    try:
        with Path(os.devnull).open("rb") as nothing, log.open("ab") as file:
            os.dup2(nothing.fileno(), 0)
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        yield
    finally:
        for descriptor, saved in enumerate(ours):
            os.dup2(saved, descriptor)
            os.close(saved)
        for number, handler in handlers.items():
            signal.signal(number, handler)
