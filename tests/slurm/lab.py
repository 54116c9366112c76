"""Jobs on the cluster of virtual nodes, looked at and hurt from outside.

Law: what is done to a job is what happens to jobs: Slurm's own commands and signals, a machine that is gone. To meet a
moment that lasts milliseconds its ranks are stopped (SIGSTOP) and let go again, which no rank can notice.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distributed.micro import metrics
from vmamba_dist.checkpoint.store import list_checkpoints
from vmamba_dist.cluster import ledger

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = Path(__file__).with_name("cluster.sh")
SUBMIT = [sys.executable, str(ROOT / "launch" / "submit.py")]
START_S = 240  # for a start on a machine that does other things as well
STEPS = 44  # of the micro run


def cluster(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(CLUSTER), *words],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def slurm(*line: str) -> str:
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode == -signal.SIGPIPE and line[:2] == (
        "scontrol",
        "show",
    ):  # seen where the machine is busy
        return slurm(*line)
    assert done.returncode == 0, f"{line}: exit code {done.returncode}: {done.stderr}"
    return done.stdout


def wait_until(condition: Callable[[], Any], what: str, limit_s: float = START_S) -> Any:
    """What `condition` returns once it is true."""
    deadline = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {limit_s} s for {what}"
        time.sleep(0.1)
    return found


@dataclass
class Job:
    """A submitted job and its run directory."""

    id: str
    run: Path
    said: str  # by submit.py

    @property
    def state(self) -> str:
        return self.field("JobState")

    def field(self, name: str) -> str:
        found = re.search(
            rf"^   (?:.* )?{name}=(\S+)", slurm("scontrol", "show", "job", self.id), re.MULTILINE
        )
        return found[1] if found else ""

    @property
    def steps(self) -> int:
        """Lines of metrics.jsonl; a line that is being written is none."""
        file = self.run / "metrics.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    @property
    def log(self) -> str:
        file = self.run / "train.log"
        return file.read_text() if file.exists() else ""

    @property
    def begun(self) -> list[int]:
        """The first step of each attempt."""
        return [int(step) for step in re.findall(r"attempt \d+ begins at step (\d+)", self.log)]

    @property
    def saved(self) -> list[int]:
        return [int(path.name.removeprefix("step-")) for path in list_checkpoints(self.run / "checkpoints")]

    @property
    def starts(self) -> list[ledger.Line]:
        return ledger.read(self.run)

    @property
    def ends(self) -> list[tuple[str, str]]:
        return [(line.verdict, line.why) for line in self.starts if line.event == "end"]

    def output(self, rank: int = 0, kind: str = "out") -> str:
        (text,) = self.outputs(rank, kind)
        return text

    def outputs(self, rank: int = 0, kind: str = "out") -> list[str]:
        return [file.read_text() for file in self.run.glob(f"slurm/*/{self.id}_{rank}_log.{kind}")]

    def results(self) -> list[tuple[str, Any]]:
        """What submitit's client finds."""
        return [pickle.loads(file.read_bytes()) for file in sorted(self.run.glob("slurm/*/*_result.pkl"))]

    def ranks(self) -> dict[int, int]:
        """rank → process id, of the ranks that live now."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment = dict(
                    pair.partition("=")[::2]
                    for pair in (folder / "environ").read_text(errors="replace").split("\0")
                )
                line = (folder / "cmdline").read_text()
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
            if (
                environment.get("SLURM_JOB_ID") == self.id
                and "submitit.core._submit" in line
                and "srun" not in line
            ):
                found[int(folder.name)] = (int(environment.get("SLURM_PROCID", "-1")), parent)
        # A reader is a fork of its rank, with the same words: its parent is a rank.
        return {rank: pid for pid, (rank, parent) in found.items() if parent not in found and rank >= 0}

    def await_step(self, step: int) -> None:
        wait_until(lambda: self.steps >= step or self.state == "COMPLETED", f"step {step} of job {self.id}")

    def await_state(self, *states: str, limit_s: float = START_S) -> None:
        try:
            wait_until(lambda: self.state in states, f"job {self.id} to be {states}", limit_s)
        except AssertionError as error:
            raise AssertionError(f"{error}; it is {self.state}\n{self.told()}") from None

    def await_end(self, state: str = "COMPLETED", limit_s: float = 2 * START_S) -> None:
        """Wait for a state after which nothing follows, and assert that it is `state`."""
        self.await_state(
            "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", limit_s=limit_s
        )
        assert self.state == state, self.told()

    def told(self) -> str:
        """What a reader of a red test needs."""
        files = sorted(self.run.glob("slurm/*/*_log.err"))
        tails = [f"== {file.name}\n" + "\n".join(file.read_text().splitlines()[-15:]) for file in files]
        return "\n".join([*map(str, self.starts), self.log[-2000:], *tails])

    @contextmanager
    def frozen(self, step: int) -> Iterator[dict[int, int]]:
        """Stop all ranks once `step` is in the metrics, and let them go on at the end."""
        wait_until(lambda: self.begun, f"job {self.id} to begin")
        ranks = self.ranks()  # looked for before the moment comes: it takes longer than some steps
        self.await_step(step)
        with stopped(ranks):
            assert self.steps < STEPS - 2, "stopped too late for what the test wants to see"
            yield ranks


@contextmanager
def stopped(ranks: dict[int, int]) -> Iterator[None]:
    """Stop processes, and let them go on at the end."""
    for pid in ranks.values():
        send(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in ranks.values():
            send(pid, signal.SIGCONT)


@contextmanager
def hanging(ranks: dict[int, int]) -> Iterator[None]:
    """Keep processes from running whatever is sent to them, until only SIGKILL is left; or until the end."""
    over = threading.Event()

    def hold() -> None:
        while not over.wait(0.002):  # Slurm sends SIGCONT before it sends SIGTERM
            for pid in ranks.values():
                send(pid, signal.SIGSTOP)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        for pid in ranks.values():
            send(pid, signal.SIGCONT)


def send(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def submit(words: list[str], run: Path, *more: str, cwd: Path = ROOT) -> Job:
    """Submit a run as a user does; return its job."""
    done = run_submit([*words, f"run.dir={run}", *more], cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"^job +(\d+)", done.stdout, re.MULTILINE)
    assert found is not None, done.stdout
    return Job(found[1], run, done.stdout)


def run_submit(words: list[str], cwd: Path = ROOT, limit_s: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*SUBMIT, *words], capture_output=True, text=True, timeout=limit_s, check=False, cwd=cwd
    )


def same_as(job: Job, whole: Path) -> None:
    """Assert that a run repeats an unbroken one, each attempt from its newest checkpoint on, and no alarm is left."""
    assert metrics(job.run) == metrics(whole), job.told()
    assert [kind for kind, _ in job.results()] == ["success"] * len(job.results())
    assert job.ends[-1][0] == "done"
    assert all(line.job == job.id for line in job.starts)


def restarts(job: Job) -> int:
    return int(job.field("Restarts"))


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
