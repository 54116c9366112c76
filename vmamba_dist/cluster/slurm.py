"""What Slurm says of a job, and what is asked of it: sbatch, scontrol, squeue; never sacct.

Law: accounting is not needed. A job's state is read from lines that no user's text can imitate, and a program that is
missing is None or a sentence, not a traceback.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

TIMEOUT_S = 60  # scontrol itself retries while the controller is away

# States after which nothing more comes, unless somebody requeues the job.
ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
}


# How a client says that the controller, or the way to it, is away; another try may find it back.
_AWAY = re.compile(
    r"Unable to contact slurm controller|Unexpected message received|Socket timed out|did not answer within|"
    r"Zero Bytes were transmitted|Connection refused|Communication connection failure|standby mode"
)


class Unanswered(RuntimeError):
    """The controller could not be asked: nothing is known, least of all that a job has ended."""


@dataclass(frozen=True)
class JobState:
    """A job as the controller sees it."""

    state: str  # RUNNING, PENDING, COMPLETING, …
    reason: str  # why it is pending or has ended: Resources, TimeLimit, …; None
    preempted: bool
    partition: str

    @property
    def running(self) -> bool:
        return self.state == "RUNNING"

    @property
    def out_of_time(self) -> bool:
        """True where Slurm ends it, or has ended it, at its time limit."""
        return self.reason == "TimeLimit"

    @property
    def ended(self) -> bool:
        return self.state in ENDED


def job_state(job: str) -> JobState | None:
    """The state of a job or of an array's element; None where Slurm does not know it, or no longer, or is not here.

    Raises Unanswered where it could not be asked.
    """
    question = ["scontrol", "show", "job", job]
    told = call(question)
    if told is not None and told.returncode < 0:  # it died of SIGPIPE, as seen where the controller is busy
        told = call(question)
    if told is None or "Invalid job id" in told.stderr:
        return None
    if told.returncode != 0:
        raise Unanswered(complaint(told.stderr))
    return parse_job(told.stdout)


def parse_job(text: str) -> JobState | None:
    """Read what `scontrol show job` prints.

    Its first line holds the job's name, which may say anything; the others begin with a field's name each.
    """
    found = re.search(r"^   JobState=(\S+) Reason=(\S+)", text, re.MULTILINE)
    if found is None:
        return None
    preempted = re.search(r"^   .*\bPreemptTime=(?!None|Unknown)\S+", text, re.MULTILINE)
    partition = re.search(r"^   Partition=(\S+)", text, re.MULTILINE)
    return JobState(found[1], found[2], preempted is not None, partition[1] if partition else "")


def preemption_requeues(partition: str) -> bool:
    """True where a job that is pre-empted in this partition is put back into the queue by Slurm itself."""
    for words, pattern in (
        (["partition", partition], r"\bPreemptMode=(\S+)"),
        (["config"], r"^PreemptMode\s*=\s*(\S+)"),
    ):
        told = call(["scontrol", "show", *words])
        found = re.search(pattern, told.stdout, re.MULTILINE) if told is not None else None
        if found is not None:
            return "REQUEUE" in found[1]
    return True


def limit_min(partition: str) -> int | None:
    """The longest time limit of a partition, "" for the default one, in minutes; None: unlimited, or not known.

    Of a list of partitions, A,B, the longest of them all: that one may take the job.
    """
    if "," in partition:
        limits = [limit_min(one) for one in partition.split(",") if one]
        return None if None in limits else max((limit for limit in limits if limit is not None), default=None)
    told = call(["scontrol", "-o", "show", "partition", *([partition] if partition else [])])
    for line in told.stdout.splitlines() if told is not None and told.returncode == 0 else ():
        found = re.search(r"\bMaxTime=(?:(\d+)-)?(\d+):(\d+):(\d+)", line)
        if (partition or " Default=YES" in line) and found is not None:
            days, hours, minutes, _ = (int(part or 0) for part in found.groups())
            return (24 * days + hours) * 60 + minutes
    return None


def call(
    line: Sequence[str], *, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str] | None:
    """Run one of Slurm's programs; None where it is not there."""
    if shutil.which(line[0]) is None:
        return None
    try:
        return subprocess.run(
            list(line),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
            errors="replace",
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(
            list(line), 124, "", f"{line[0]} did not answer within {TIMEOUT_S} s"
        )


def is_away(told: subprocess.CompletedProcess[str]) -> bool:
    """True where a program failed because it did not reach the controller, or had no answer from it."""
    return told.returncode != 0 and _AWAY.search(told.stderr) is not None


def without_job(environment: Mapping[str, str]) -> dict[str, str]:
    """What a new job may inherit from inside another: nothing that describes that one, as its place in an array."""
    return {
        key: value
        for key, value in environment.items()
        if key == "SLURM_CONF" or not key.startswith(("SLURM_", "SUBMITIT_"))
    }


def complaint(text: str) -> str:
    """What a failing sbatch or scontrol said, in one line."""
    lines = [
        re.sub(r"^(sbatch|scontrol|squeue): (error: )?", "", line)
        for line in text.splitlines()
        if line.strip()
    ]
    return "; ".join(lines) or "it said nothing"
