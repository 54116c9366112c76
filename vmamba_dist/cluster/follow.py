"""Stay with a job: show its log, pass on the wish to stop, end with its exit code.

Law: a follower never decides what is saved. It asks (SIGTERM to the controller, which passes it to every
rank), waits, and reports; what it cannot learn from the job it says it does not know. Of a job on Slurm it is only a
reader: Ctrl-C leaves the job alone.
"""

from __future__ import annotations

import os
import pickle
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import submitit

from vmamba_dist.cluster import ledger, slurm
from vmamba_dist.cluster.job import FAILED, MISUSED, Report, pid_file
from vmamba_dist.core.log import Bar, progress_bar

REQUEUE = 75  # EX_TEMPFAIL: stopped and saved, start it again
GRACE_S = 15.0  # for the other ranks, once one has failed, or to begin, once asked to stop
_POLL_S = 0.2
_SLURM_POLLS = 10  # of the log between two questions to the controller
STEP = re.compile(r" step (\d+)/(\d+)  ")  # as train/record.py logs it


@dataclass
class Requests:
    """How often the user has asked to stop."""

    count: int = 0

    def add(self, number: int, frame: FrameType | None) -> None:
        self.count += 1

    @contextmanager
    def listening(self) -> Iterator[None]:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, self.add) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@dataclass
class Tail:
    """The lines that a growing file gains after `position` bytes; it may not exist yet."""

    path: Path
    position: int = 0
    rest: bytes = b""

    def lines(self) -> list[str]:
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self.position)
            new = file.read()
        self.position += len(new)
        *whole, self.rest = (self.rest + new).split(b"\n")
        return [line.decode(errors="replace") for line in whole]


@dataclass(frozen=True)
class Task:
    """One process of the job, as its files show it."""

    rank: int
    job: submitit.Job[Report] = field(repr=False)

    @property
    def begun(self) -> bool:
        return pid_file(self.job.paths.folder, self.rank).exists()

    @property
    def result(self) -> tuple[str, Report | str] | None:
        """("success", Report) or ("error", traceback), None while there is neither."""
        path = self.job.task(self.rank).paths.result_pickle
        if not path.exists():
            return None
        kind, value = pickle.loads(path.read_bytes())
        return kind, value

    @property
    def ended_at(self) -> float:
        return self.job.task(self.rank).paths.result_pickle.stat().st_mtime

    @property
    def running(self) -> bool:
        """True from its begin until its end; a process that has only just begun may be neither."""
        file = pid_file(self.job.paths.folder, self.rank)
        text = file.read_text() if file.exists() else ""
        if not text:
            return False
        try:
            os.kill(int(text), 0)
        except ProcessLookupError:
            return False
        return True

    @property
    def failed(self) -> bool:
        result = self.result
        if result is None:
            return self.begun and not self.running and self.result is None
        kind, value = result
        return kind != "success" or (isinstance(value, Report) and value.exit_code not in (0, REQUEUE))


def stay_with(job: submitit.Job[Report], tasks: int, log: Path, *, since: int) -> int:
    """Show the lines that `log` gains after `since` bytes until the job ends; return its exit code."""
    ranks = [Task(rank, job) for rank in range(tasks)]
    controller = int(job.job_id)
    requests, heard = Requests(), 0
    tail = Tail(log, since)
    failed_at = asked_at = float("inf")
    with requests.listening(), progress_bar(None) as bar:
        while not job.done():
            _show(tail, bar)
            now = time.monotonic()
            if requests.count > heard:
                heard = requests.count
                if heard == 1:
                    asked_at = now
                    print("stopping: the job saves and ends (once more kills it)", flush=True)
                    _signal(controller, signal.SIGTERM)
                else:
                    print("killed", flush=True)
                    _signal(controller, signal.SIGKILL)
            if any(task.failed for task in ranks):
                failed_at = min(failed_at, now)
            stuck = now > failed_at + GRACE_S and any(task.running for task in ranks)
            unborn = now > asked_at + GRACE_S and not all(task.begun for task in ranks)
            if stuck or unborn:
                _signal(controller, signal.SIGKILL)  # its ranks end with it
            time.sleep(_POLL_S)
        _show(tail, bar)
    return _conclude(ranks, asked=heard > 0)


def watch_slurm(job: str, run: Path, log: Path, *, since: int) -> int:
    """Show the lines that `log` gains after `since` bytes until nothing follows the job; return how it ended.

    0 finished, 2 misused, 1 else; Ctrl-C leaves the job alone and returns 0.
    """
    tail = Tail(log, since)
    told: tuple[str, str] | None = None
    ended = 0
    away = False
    try:
        with progress_bar(None) as bar:
            while ended < 2:  # twice: a job that is requeued may look ended for a moment
                try:
                    state = slurm.job_state(job)
                    ended = ended + 1 if state is None or state.ended else 0
                    away = False
                except slurm.Unanswered as error:
                    state, ended = None, 0
                    if not away:
                        print(f"job {job}: Slurm does not answer, asking again ({error})", flush=True)
                    away = True
                if state is not None and (state.state, state.reason) != told:
                    told = (state.state, state.reason)
                    because = "" if state.reason == "None" else f" ({state.reason})"
                    print(f"job {job}: {state.state.lower()}{because}", flush=True)
                for _ in range(_SLURM_POLLS):
                    _show(tail, bar)
                    time.sleep(_POLL_S)
                # Not the last line: the heir may have begun meanwhile.
                heirs = [line.successor for line in _lines(run, job) if line.event == "resubmitted"]
                if heirs and ended == 2:
                    print(f"job {job} goes on as job {heirs[-1]}", flush=True)
                    job, told, ended = heirs[-1], None, 0
    except KeyboardInterrupt:
        print(f"job {job} goes on; to stop it: scancel {job}", flush=True)
        return 0
    last = next(reversed(_lines(run, job)), None)
    if last is not None and last.verdict == "done":
        return 0
    why = f"{last.verdict}: {last.why}" if last is not None and last.event == "end" else "it said nothing"
    print(f"vmamba: job {job} has ended: {why}; log: {log}", file=sys.stderr)
    return last.code if last is not None and last.code == MISUSED else FAILED


def _lines(run: Path, job: str) -> list[ledger.Line]:
    return [line for line in ledger.read(run) if line.job == job]


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return  # it has ended meanwhile: what was asked for


def _show(tail: Tail, bar: Bar) -> None:
    for line in tail.lines():
        print(line, flush=True)
        step = STEP.search(line)
        if step is not None:
            bar.show(int(step[1]), "training", int(step[2]))


def _conclude(ranks: list[Task], *, asked: bool) -> int:
    results = [task.result for task in ranks]
    reports = [
        value for result in results if result is not None for value in result[1:] if isinstance(value, Report)
    ]
    refused = next((report for report in reports if report.message), None)
    if refused is not None:
        print(f"vmamba: {refused.message}", file=sys.stderr)
        return refused.exit_code
    errors = [
        task
        for task, result in zip(ranks, results, strict=True)
        if result is not None and result[0] == "error"
    ]
    if not errors and len(reports) == len(ranks):
        return max(report.exit_code for report in reports)
    if asked and not errors:
        return REQUEUE
    print(_blame(ranks, errors), file=sys.stderr)
    return FAILED


def _blame(ranks: list[Task], errors: list[Task]) -> str:
    """Name the rank that failed first: the others fail because it has gone."""
    silent = [task for task in ranks if task.result is None]
    if silent:
        task = silent[0]
        text = f"rank {task.rank} ended without a word: killed, out of memory, or ended for the reason in the log"
    else:
        task = min(errors, key=lambda error: error.ended_at)
        _, trace = task.result or ("error", "")
        text = f"rank {task.rank} failed:\n" + "\n".join(str(trace).rstrip().splitlines()[-20:])
    return f"{text}\nlog: {task.job.task(task.rank).paths.stderr}"
