"""The batch script's word before and after each start of a Slurm job: done, go on, or stop and say why.

Law: what a start achieved is read from its run directory, never from a process that may be dead. A job goes on under
its own id until its run is finished, unless its user or what it would repeat says no: a mistake in the config,
launch.max_requeues, a cancellation, or three starts in a row that brought no new checkpoint. What was decided, and
why, is a line in RUN/slurm/starts.jsonl.

`begin`, `heard` and `end` run on the job's first machine in a Python without torch. `end` is an EXIT trap, because any
rank may be the one that died, and Slurm requeues no job for that. `heard` answers SIGTERM, because ranks that hang
keep the script from its end until both are killed.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from submitit.core.utils import DelayedSubmission, JobPaths

from vmamba_dist.checkpoint.store import list_checkpoints, step_of
from vmamba_dist.cluster import ledger, slurm
from vmamba_dist.cluster.env import SlurmStart, slurm_start
from vmamba_dist.cluster.job import MISUSED, TrainJob, outcome_file
from vmamba_dist.cluster.ledger import Line, fruitless_starts

AGAIN = 75  # EX_TEMPFAIL: the batch script's exit code where the job goes on
FRUITLESS = 3  # starts in a row without a new checkpoint: then the next would bring none either
PICKLE_S = 60  # submitit writes it after sbatch has returned
TRIES, PAUSE_S = 3, 5.0  # of a requeue that is refused
PATIENCE_S = 15 * 60.0  # with a controller that does not answer: a restart or a fail-over is over by then


@dataclass(frozen=True)
class Verdict:
    """What follows a start."""

    kind: Literal["done", "go on", "leave", "stop"]  # leave: somebody else has decided already
    why: str
    counts: bool = True
    code: int = 0


def decide(
    code: int,
    outcomes: Sequence[tuple[str, str]],
    state: slurm.JobState | None,
    fruitless: int,
    restart: int,
    max_requeues: int | None,
    *,
    slurm_requeues: bool = True,
) -> Verdict:
    """Say what follows a start that ended with srun's exit `code` and its ranks' (outcome, message), the first first.

    state: as the controller sees the job now, None where this machine has nothing to ask it with. fruitless: starts in
    a row, this one included, that brought no new checkpoint. slurm_requeues: what pre-emption does in its partition.
    """
    said = dict(reversed(outcomes))  # the first that failed knows why
    if "finished" in said:
        return Verdict("done", "the run is finished")
    if "misused" in said:
        return Verdict("stop", said["misused"], code=MISUSED)
    out_of_time = state is not None and state.out_of_time
    preempted = state is not None and state.preempted
    if state is not None and not state.running and not out_of_time and not (preempted and not slurm_requeues):
        return Verdict("leave", f"ended from outside (Slurm's state: {state.state})", counts=False)
    if preempted:
        why = "pre-empted"
    elif out_of_time:
        why = "killed at its time limit"
    elif "requeue" in said:
        why = "asked to stop"
    else:
        why = said.get("failed") or f"ended with code {code}{_by_signal(code)}"
    saved = ", saved" if "requeue" in said else ""
    if max_requeues is not None and restart >= max_requeues:
        return Verdict("stop", f"{why}{saved}; launch.max_requeues={max_requeues} is reached", code=code or 1)
    if fruitless >= FRUITLESS and not preempted:
        return Verdict(
            "stop", f"{why}; {fruitless} starts in a row have brought no new checkpoint", code=code or 1
        )
    return Verdict("go on", why + saved, counts=not preempted)


def _by_signal(code: int) -> str:
    return f" (a rank was killed by signal {code - 128})" if 128 < code < 160 else ""


@dataclass(frozen=True)
class Start:
    """A start of a job with all that is known of it."""

    slurm: SlurmStart
    folder: Path
    job: TrainJob

    @classmethod
    def here(cls, folder: Path) -> Start:
        """The start that this batch script belongs to."""
        start = slurm_start()
        if start is None:
            raise RuntimeError("not inside a Slurm job: SLURM_JOB_ID is not set")
        pickled = JobPaths(folder, start.key).submitted_pickle
        deadline = time.monotonic() + PICKLE_S
        while not pickled.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        job = DelayedSubmission.load(pickled).function
        assert isinstance(job, TrainJob), f"{pickled} holds no TrainJob"
        return cls(start, folder, job)

    @property
    def run(self) -> Path:
        return Path(self.job.config["run"]["dir"]).absolute()

    @property
    def step(self) -> int:
        """The newest checkpoint's; 0 without one."""
        return max((step_of(path) or 0 for path in list_checkpoints(self.run / "checkpoints")), default=0)

    @property
    def decided(self) -> Line | None:
        """What has been said already of what follows this start."""
        ours = ("end", self.slurm.key, self.slurm.restart)
        return next((line for line in self.lines() if (line.event, line.job, line.restart) == ours), None)

    @property
    def has_begun(self) -> bool:
        """False where the batch script came to its end before `begin`."""
        ours = ("begin", self.slurm.key, self.slurm.restart)
        return any((line.event, line.job, line.restart) == ours for line in self.lines())

    @property
    def restarts(self) -> int:
        """Starts before this one; Slurm does not count those of jobs that this one was submitted anew from."""
        begun = sum(line.event == "begin" for line in self.lines())
        return max(self.slurm.restart, begun - 1)

    @property
    def ranks(self) -> range:
        launch = self.job.config["launch"]
        return range(launch["nodes"] * (launch["tasks_per_node"] or launch["gpus_per_node"] or 1))

    def paths(self, rank: int) -> JobPaths:
        return JobPaths(self.folder, self.slurm.key, rank)

    def lines(self) -> list[Line]:
        """The ledger's lines of this submission, resubmissions of itself included."""
        return [line for line in ledger.read(self.run) if line.folder == self.folder.name]

    def note(self, event: Literal["begin", "end", "resubmitted"], **fields: Any) -> None:
        """Write a line of the ledger about this start."""
        line = Line(event, self.folder.name, self.slurm.key, self.slurm.restart, self.step, **fields)
        ledger.append(self.run, line)


def begin(start: Start) -> int:
    """Clear away what an earlier start left to be misread; return 0, or 1 where nothing should start again."""
    for rank in start.ranks:
        result = start.paths(rank).result_pickle
        result.unlink(missing_ok=True)
        # submitit does not start where a half-written one lies.
        result.with_suffix(".pkl.save_tmp").unlink(missing_ok=True)
        outcome_file(start.folder, start.slurm.key, rank).unlink(missing_ok=True)
    lines = start.lines()
    start.note("begin", nodes=start.slurm.nodes)
    most = start.job.config["launch"]["max_requeues"]
    if most is not None and start.restarts > most:
        return 1
    return int(fruitless_starts(lines, start.step) >= FRUITLESS)


def heard(start: Start) -> int:
    """Say what follows where Slurm has begun to end the job for good: SIGKILL comes next, to the batch script too.

    Ranks that save are not disturbed by a requeue at this point.
    """
    try:
        state = slurm.job_state(start.slurm.key)
    except slurm.Unanswered:
        return 0  # `end` asks again, if it comes to that
    if state is not None and (state.out_of_time or (state.preempted and not state.running)):
        return end(start, 128 + signal.SIGTERM)
    return 0


def end(start: Start, code: int) -> int:
    """Say and do what follows this start; return the batch script's exit code."""
    before = start.decided
    if before is not None:
        return AGAIN if before.verdict == "go on" else before.code
    outcomes = read_outcomes(start)
    if not start.has_begun:
        # launch.setup ended the script, perhaps because Python needs it: it counts as a start all the same.
        begin(start)
        outcomes = [("failed", f"launch.setup ended the script with code {code}, before training")]
    until = time.monotonic() + PATIENCE_S
    settled = {"finished", "misused"} & {outcome for outcome, _ in outcomes}
    try:
        state = None if settled else patient_state(start.slurm.key, until)
    except slurm.Unanswered as error:  # it may have been cancelled: that is not gone against blindly
        return stop(start, f"Slurm did not answer for {PATIENCE_S / 60:.0f} minutes ({error})")
    verdict = decide(
        code,
        outcomes,
        state,
        fruitless_starts(start.lines(), start.step),
        start.restarts,
        start.job.config["launch"]["max_requeues"],
        slurm_requeues=state is None or not state.preempted or slurm.preemption_requeues(state.partition),
    )
    start.note("end", code=verdict.code or code, verdict=verdict.kind, why=verdict.why, counts=verdict.counts)
    print(f"vmamba: {verdict.kind}: {verdict.why} (step {start.step})", file=sys.stderr, flush=True)
    if verdict.kind == "go on":
        return go_on(start, until)
    if verdict.kind == "stop":
        tell_client(start, verdict.why)
    return verdict.code


def patient_state(key: str, until: float) -> slurm.JobState | None:
    """The job's state, asked for again while nobody answers. Raises Unanswered after `until` (time.monotonic)."""
    told = False
    while True:
        try:
            return slurm.job_state(key)
        except slurm.Unanswered as error:
            if time.monotonic() > until:
                raise
            if not told:
                print(f"vmamba: Slurm does not answer, asking again ({error})", file=sys.stderr, flush=True)
            told = True
        time.sleep(PAUSE_S)


def go_on(start: Start, until: float) -> int:
    """Requeue this job under its id; where that is not allowed submit it anew; else leave the command to.

    A controller that is away is asked again, until `until` (time.monotonic).
    """
    refusal = "there is no scontrol on this machine"
    refused = 0
    while refused < TRIES:
        told = slurm.call(["scontrol", "requeue", start.slurm.key])
        if told is None:
            break
        if told.returncode == 0:
            return AGAIN
        refusal = slurm.complaint(told.stderr)
        if "disabled" in refusal:
            break
        refused += not slurm.is_away(told)
        try:
            if _is_requeued(patient_state(start.slurm.key, until)):
                return AGAIN  # which ended the scontrol that asked for it
        except slurm.Unanswered:
            break
        if time.monotonic() > until:
            break
        time.sleep(PAUSE_S)
    return resubmit(start, refusal)


def _is_requeued(state: slurm.JobState | None) -> bool:
    if state is None or state.out_of_time or state.state not in ("PENDING", "COMPLETING"):
        return False
    return not state.preempted or slurm.preemption_requeues(state.partition)


def resubmit(start: Start, refusal: str) -> int:
    """Submit the same script as a new job; print and record the command where that fails too."""
    script = start.paths(0).submission_file
    words = ["sbatch", "--parsable"]
    element = start.slurm.key.partition("_")[2]
    if element:
        words.append(f"--array={element}")
    told = slurm.call([*words, str(script)], environment=slurm.without_job(os.environ))
    if told is None or told.returncode != 0:
        said = "there is no sbatch" if told is None else slurm.complaint(told.stderr)
        why = f"cannot be requeued ({refusal}) nor submitted anew ({said})"
        return stop(start, why)
    job = told.stdout.strip().partition(";")[0]
    key = f"{job}_{element}" if element else job
    shutil.copyfile(start.paths(0).submitted_pickle, JobPaths(start.folder, key).submitted_pickle)
    shutil.copyfile(script, JobPaths(start.folder, key).submission_file)
    start.note("resubmitted", successor=key, why=f"it cannot be requeued: {refusal}")
    print(f"vmamba: goes on as job {key}: {refusal}", file=sys.stderr, flush=True)
    return AGAIN


def stop(start: Start, why: str) -> int:
    """Say why nothing follows, and the command to go on with; return the batch script's exit code."""
    why = f"{why}; to go on: {start.job.command}"
    start.note("end", code=1, verdict="stop", why=why)
    print(f"vmamba: {why}", file=sys.stderr, flush=True)
    tell_client(start, why)
    return 1


def tell_client(start: Start, why: str) -> None:
    """Leave a result for whoever waits for this job with submitit, which without accounting waits for ever."""
    for rank in start.ranks:
        result = start.paths(rank).result_pickle
        if not result.exists():
            beside = result.with_suffix(".last_word")
            beside.write_bytes(pickle.dumps(("error", why)))
            beside.replace(result)


def read_outcomes(start: Start) -> list[tuple[str, str]]:
    """What the ranks of this start said of its end, (outcome, message), the first first; the killed said nothing."""
    files = [outcome_file(start.folder, start.slurm.key, rank) for rank in start.ranks]
    files = sorted((file for file in files if file.exists()), key=lambda file: file.stat().st_mtime)
    said = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return [
        (str(one["outcome"]), str(one["message"])) for one in said if one["restart"] == start.slurm.restart
    ]


def main(words: Sequence[str]) -> int:
    """`begin FOLDER`, `heard FOLDER` or `end FOLDER CODE`, inside a batch script."""
    verb, folder, *rest = words
    start = Start.here(Path(folder))
    if verb == "begin":
        return begin(start)
    if verb == "heard":
        return heard(start)
    return end(start, int(rest[0]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
