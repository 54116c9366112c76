"""What a job runs: one picklable object, called once in each of its processes.

Law: a task ends when its launcher ends. State is never in the pickle, always in the run directory, so
the same pickle may be started again at any time.
"""

from __future__ import annotations

import fcntl
import os
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmamba_dist.cluster import env
from vmamba_dist.config import UserError, from_dict
from vmamba_dist.core.rundir import RunBusy, last_attempt

FAILED = 1
MISUSED = 2  # a user's mistake, told in one line


@dataclass(frozen=True)
class Report:
    """How a task ended: its exit code, and a user's mistake in one line where that was the reason."""

    exit_code: int
    message: str = ""


@dataclass(frozen=True)
class TrainJob:
    """Train as one process of a job."""

    config: dict[str, Any]  # resolved, nested plain values
    rendezvous: str  # where the ranks of this start meet; never used twice
    devices: str | None  # CUDA_VISIBLE_DEVICES of the submitter
    tether: str | None  # a file that a follower keeps locked while it lives; None: the job stands alone

    def __call__(self) -> Report:
        place = env.submitit_place()
        os.setsid()  # the terminal's Ctrl-C is for the follower, which asks all ranks to stop together
        # Until the trainer can save, a signal has nothing to wait for. submitit would swallow SIGTERM and
        # answer SIGUSR2 by a requeue of its own.
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGCONT):
            signal.signal(number, signal.SIG_DFL)
        pid_file(env.submitit_folder(), place.rank).write_text(str(os.getpid()))
        if self.tether is not None:
            threading.Thread(target=_end_with, args=(self.tether,), daemon=True).start()
        env.enter(place, self.rendezvous)
        env.share_threads(place.local_size)
        env.show_devices(self.devices)

        # Here and not above: torch reads the environment when it loads, and a submitter needs no torch.
        from vmamba_dist.core.dist import end_with_parent
        from vmamba_dist.train import run

        end_with_parent()
        if not env.launcher_lives():  # it died before the kernel was asked to watch it
            return Report(FAILED, "the launcher has ended")
        try:
            return Report(run(from_dict(self.config)).exit_code)
        except RunBusy as error:
            return Report(MISUSED, f"{error}. {_about_the_owner(Path(self.config['run']['dir']))}")
        except UserError as error:
            return Report(MISUSED, str(error))


def pid_file(folder: Path, rank: int) -> Path:
    """Where the task of `rank` writes its process id, in the job's own folder."""
    return folder / f"{rank}.pid"


def _about_the_owner(run: Path) -> str:
    owner = last_attempt(run)
    stop = f"; stop it, it saves first: kill {owner.pid}" if owner else ""
    return f"Watch it: tail -f {run / 'train.log'}{stop}"


def _end_with(tether: str) -> None:
    """Wait for the lock that a living follower holds, then end this process at once."""
    with Path(tether).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        os.kill(os.getpid(), signal.SIGKILL)
