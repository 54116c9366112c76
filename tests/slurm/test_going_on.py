"""A job goes on by itself under its own id, whatever ended it, and ends with an undisturbed run's numbers."""

from __future__ import annotations

import os
import re
import shlex
import signal
import time
from pathlib import Path

import pytest

from distributed.micro import metrics
from slurm import lab
from slurm.lab import STEPS, Job, hanging, restarts, same_as, stopped, submit, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


def test_two_nodes_with_two_tasks_train_to_the_end(whole: Job) -> None:
    assert [line["step"] for line in metrics(whole.run)] == list(range(1, STEPS + 1))
    assert restarts(whole) == 0
    for rank in range(4):
        assert f"rank {rank} of 4 on node[" in whole.output(rank)
        assert "2 cores" in whole.output(rank)
    # Tasks of this cluster are not bound to cores (task/none), and inherit sbatch's SLURM_CPUS_PER_TASK: they would say
    # the same without srun's own option, which Slurm needs since 22.05 to give them the cores of their workers.
    (script,) = whole.run.glob("slurm/*/*_submission.sh")
    (line,) = re.findall(r"^srun .*$", script.read_text(), re.MULTILINE)
    assert "--cpus-per-task=2" in shlex.split(line)
    assert "\n#SBATCH --cpus-per-task=2\n" in script.read_text()
    assert int(whole.field("NumCPUs")) == 2 * 2 * 2
    assert [result for _, result in whole.results()] == [whole.results()[0][1]] * 4
    same_as(whole, whole.run)


def test_one_rank_is_killed(words: list[str], whole: Job, tmp_path: Path) -> None:
    """SIGKILL, as the kernel does out of memory: Slurm itself would call the job failed. Rank 0, who speaks for all."""
    job = submit(words, tmp_path / "run")
    with job.frozen(9) as ranks:
        wait_until(lambda: job.saved, "a checkpoint")
        newest = job.saved[-1]
        os.kill(ranks[0], signal.SIGKILL)
    job.await_end()
    same_as(job, whole.run)
    assert restarts(job) == 1
    assert job.ends[0][0] == "go on"
    assert job.begun[0] == 1
    assert job.begun[1] > newest, "at most the steps since the last save are repeated"


def test_a_signal_to_one_rank_stops_all_at_the_same_step(
    words: list[str], whole: Job, tmp_path: Path
) -> None:
    job = submit(words, tmp_path / "run")
    with job.frozen(9) as ranks:
        os.kill(ranks[3], signal.SIGUSR2)
    job.await_end()
    same_as(job, whole.run)
    assert restarts(job) == 1
    assert job.ends[0] == ("go on", "asked to stop, saved")
    stopped = int(job.log.partition("asked to stop: saved step ")[2].partition(";")[0])
    assert job.begun == [1, stopped + 1]  # nothing is repeated


def test_signals_in_the_first_second_and_while_a_start_still_loads(
    words: list[str], whole: Job, tmp_path: Path
) -> None:
    job = submit(words, tmp_path / "run")
    ranks = wait_until(job.ranks, "a rank")
    lab.slurm("scancel", "--signal=USR2", job.id)  # Python itself has only begun
    assert not job.begun
    wait_until(lambda: "start 2, rank 2 of 4" in "".join(job.outputs(2)), "the second start's first words")
    attempts = len(job.begun)
    later = job.ranks()
    assert not set(later.values()) & set(ranks.values())
    os.kill(later[2], signal.SIGUSR2)  # torch is still loading
    job.await_end()
    same_as(job, whole.run)
    assert restarts(job) == 2
    assert job.ends[1] == ("go on", "asked to stop, saved")
    assert len(job.begun) == attempts + 2
    assert job.begun[-1] < 8


def test_requeued_from_outside(words: list[str], whole: Job, tmp_path: Path) -> None:
    job = submit(words, tmp_path / "run")
    with job.frozen(9):
        newest = job.saved[-1]
        lab.slurm("scontrol", "requeue", job.id)  # SIGCONT and SIGTERM to all, SIGKILL later
    job.await_end()
    same_as(job, whole.run)
    assert restarts(job) == 1
    assert job.begun[1] > newest
    assert not any(line.counts for line in job.starts if line.event == "end" and line.verdict == "leave")


def rival() -> Job:
    """A job that wants every node and may take them from the partition `low`."""
    line = ["sbatch", "--parsable", "--partition=high", "--nodes=4", "--exclusive", "--time=5"]
    number = lab.slurm(*line, "--output=/dev/null", "--wrap=sleep 5").strip()
    return Job(number, Path("nowhere"), "")


def test_preempted_by_a_higher_partition(words: list[str], whole: Job, tmp_path: Path) -> None:
    job = submit(words, tmp_path / "run", "launch.partition=low")
    with job.frozen(9):
        other = rival()
        time.sleep(3)  # the scheduler looks every two seconds
    job.await_end()
    same_as(job, whole.run)
    assert other.state == "COMPLETED"
    assert restarts(job) == 1
    assert job.ends[0] == ("go on", "pre-empted, saved")


def test_preempted_where_that_cancels_a_job_while_its_ranks_hang(
    words: list[str], whole: Job, tmp_path: Path
) -> None:
    """Slurm would not put it back, and kills the batch script after the grace: it has said its word by then."""
    lab.slurm("scontrol", "update", "PartitionName=low", "PreemptMode=CANCEL", "GraceTime=5")
    try:
        job = submit(words, tmp_path / "run", "launch.partition=low")
        wait_until(lambda: job.begun, "the first step")
        with hanging(job.ranks()):
            other = rival()
            wait_until(lambda: job.ends, "the word of the batch script")
            wait_until(lambda: not job.ranks(), "their end")
        job.await_end()
    finally:
        lab.slurm("scontrol", "update", "PartitionName=low", "PreemptMode=REQUEUE", "GraceTime=60")
    same_as(job, whole.run)
    assert other.state == "COMPLETED"
    assert restarts(job) == 1
    assert job.ends[0] == ("go on", "pre-empted")


def test_a_node_is_gone(words: list[str], whole: Job, tmp_path: Path) -> None:
    """slurmd, its steps and the ranks at once, on the machine that also ran the batch script."""
    job = submit(words, tmp_path / "run")
    with job.frozen(9):
        newest = job.saved[-1]
        node = job.field("BatchHost")
        lab.cluster("kill-node", node)
    try:
        job.await_end()
    finally:
        lab.cluster("revive-node", node)
    same_as(job, whole.run)
    assert restarts(job) >= 1
    assert job.begun[1] > newest


@pytest.mark.slow  # two minutes; the pre-emption that cancels goes the same way
def test_ranks_that_hang_beyond_the_time_limit(words: list[str], whole: Job, tmp_path: Path) -> None:
    """Slurm then kills the batch script with them, before its end: what follows must have been said before."""
    job = submit(words, tmp_path / "run", "launch.time_limit_min=3", "launch.signal_delay_s=10")
    lab.slurm("scontrol", "update", f"JobId={job.id}", "TimeLimit=1")
    wait_until(lambda: job.begun, "the first step")
    with hanging(job.ranks()):
        wait_until(lambda: job.ends, "the word of the batch script")
        wait_until(lambda: not job.ranks(), "their end")
    lab.slurm("scontrol", "update", f"JobId={job.id}", "TimeLimit=10")
    job.await_end()
    same_as(job, whole.run)
    assert restarts(job) == 1
    assert job.ends[0] == ("go on", "killed at its time limit")


def test_the_time_limit_three_times(words: list[str], whole: Job, tmp_path: Path) -> None:
    job = submit(words, tmp_path / "run", "launch.time_limit_min=3", "launch.signal_delay_s=10")
    lab.slurm(
        "scontrol", "update", f"JobId={job.id}", "TimeLimit=1"
    )  # nobody waits three minutes, three times
    for attempt in range(3):
        wait_until(lambda: len(job.ranks()) == 4, f"the ranks of start {attempt + 1}")
        ranks = job.ranks()
        wait_until(lambda attempt=attempt: len(job.begun) > attempt, f"start {attempt + 1}")
        with stopped(ranks):
            # The warning comes 10 s before the limit, and up to 30 s earlier, because Slurm looks every half minute:
            # on a slow day before training begins, and then the start may have ended already.
            wait_until(
                lambda attempt=attempt: _seconds(job.field("RunTime")) >= 51 or len(job.ends) > attempt,
                "the warning",
            )
        wait_until(lambda attempt=attempt: len(job.ends) > attempt, f"the end of start {attempt + 1}")
    lab.slurm("scontrol", "update", f"JobId={job.id}", "TimeLimit=10")  # three are enough
    job.await_end()
    same_as(job, whole.run)
    assert restarts(job) == 3
    assert job.ends[:3] == [("go on", "asked to stop, saved")] * 3
    assert len(set(job.begun)) == 4  # each start got further


def _seconds(clock: str) -> int:
    hours, minutes, seconds = map(int, clock.rpartition("-")[2].split(":"))
    return 3600 * hours + 60 * minutes + seconds
