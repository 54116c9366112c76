"""What a job runs: one picklable object, called once in each of its processes.

Law: a task ends when its launcher ends. State is never in the pickle, always in the run directory, so
the same pickle may be started again at any time. On Slurm a task writes how it ended into a file of its own, and
leaves a result for submitit's client only where nothing will follow: what follows is said in requeue.py.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vmamba_dist.cluster import env
from vmamba_dist.config import ConfigError, UserError, from_dict
from vmamba_dist.core.rundir import RunBusy, last_attempt

FAILED = 1
MISUSED = 2  # a user's mistake, told in one line
STOPS = (signal.SIGTERM, signal.SIGUSR2)


@dataclass(frozen=True)
class Report:
    """How a task ended: its exit code, and a user's mistake in one line where that was the reason."""

    exit_code: int
    message: str = ""


@dataclass(frozen=True)
class TrainJob:
    """Train as one process of a job. On Slurm the config is all it needs: the rest follows from the job's variables."""

    config: dict[str, Any]  # resolved, nested plain values
    rendezvous: str = ""  # here: where the ranks of this start meet; never used twice
    devices: str | None = None  # here: CUDA_VISIBLE_DEVICES of the submitter
    tether: str | None = (
        None  # here: a file that a follower keeps locked while it lives; None: nobody follows
    )
    command: str = ""  # that submits the same again

    def __call__(self) -> Report:
        # submitit would swallow SIGTERM and answer SIGUSR2 by a requeue of its own.
        signal.signal(signal.SIGCONT, signal.SIG_DFL)
        start = env.slurm_start()
        return self._here() if start is None else self._on_slurm(start)

    def _here(self) -> Report:
        for number in STOPS:
            signal.signal(number, signal.SIG_DFL)  # until the trainer can save, they have nothing to wait for
        place = env.submitit_place()
        os.setsid()  # the terminal's Ctrl-C is for the follower, which asks all ranks to stop together
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

    def _on_slurm(self, start: env.SlurmStart) -> Report:
        # A warning may come while torch is still loading: it waits for the trainer, which then saves its first step.
        # Once training has ended there is nothing left to stop, hence ignored.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        for number in STOPS:
            signal.signal(number, signal.SIG_IGN)
        place = env.submitit_place()
        env.enter(place, env.slurm_rendezvous(start, env.first_host()))
        env.use_cpus_of_task()
        print(
            f"job {start.key}, start {start.restart + 1}, rank {place.rank} of {place.size} on {start.nodes}; "
            f"{env.cores_of_task()} cores, GPUs {env.visible_devices() or 'none'}; code {code_folder()}",
            flush=True,
        )

        outcome, message = self._train(start)
        file = outcome_file(env.submitit_folder(), start.key, place.rank)
        beside = file.with_suffix(".tmp")
        beside.write_text(json.dumps({"restart": start.restart, "outcome": outcome, "message": message}))
        beside.replace(file)
        if outcome == "finished":
            return Report(0)
        if outcome == "misused":
            return Report(MISUSED, message)
        sys.stdout.flush()
        sys.stderr.flush()
        # Without a result: it would tell a client that the job is over. And at once: a collective that failed may
        # have left threads behind that an orderly end would wait for.
        os._exit(0 if outcome == "requeue" else FAILED)

    def _train(self, start: env.SlurmStart) -> tuple[str, str]:
        """How this start ended, and why in a line."""
        # Here and not above: see _here.
        from vmamba_dist.core.dist import end_with_parent
        from vmamba_dist.train import Outcome, run

        end_with_parent()
        try:
            outcome = run(from_dict(self.config))
        except RunBusy as error:
            owner = last_attempt(self.config["run"]["dir"])
            if (
                owner is not None and owner.job == start.key
            ):  # the last ranks of an earlier start: they end soon
                return "failed", str(error)
            return "misused", str(error)
        except ConfigError as error:
            # The config has started before: what is wrong now is the machine, a folder that is not mounted perhaps.
            return ("misused" if start.restart == 0 else "failed"), str(error)
        except UserError as error:  # storage that fails, numbers that explode: another start may fare better
            return "failed", str(error)
        except Exception as error:  # noqa: BLE001 - it is told, and the batch script decides what follows
            traceback.print_exc()
            return "failed", f"{type(error).__name__}: {error}"
        return ("requeue" if outcome is Outcome.REQUEUE else "finished"), ""


def outcome_file(folder: Path, key: str, rank: int) -> Path:
    """Where the task of `rank` of a Slurm job writes how it ended."""
    return folder / f"{key}_{rank}_outcome.json"


def code_folder() -> Path:
    """The folder that this code runs from: a snapshot, a checkout, or where it is installed."""
    return Path(__file__).resolve().parents[2]


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
