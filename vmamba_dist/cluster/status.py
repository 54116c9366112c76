"""What run directories tell about their runs, without touching them.

Law: reads files only, and squeue where there is one; never accounting, never torch. A line that is still being
written is no line.

Whether a run lives is read off its lock, which a living owner holds; how far it is, off its newest checkpoint and
the last lines of metrics.jsonl.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import socket
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vmamba_dist.checkpoint import store
from vmamba_dist.checkpoint.store import CheckpointError, Meta
from vmamba_dist.cluster import ledger, slurm
from vmamba_dist.config.schema import ConfigError
from vmamba_dist.core.rundir import Attempt, attempts, last_attempt

SWEEP = "sweep.json"  # in a sweep's folder: its points
ROOT = "runs"  # where runs lie unless somebody says otherwise
STALE_S = 900.0  # a living owner that writes nothing for this long hangs, or saves very much
_FRESH_S = 60.0  # somebody who wrote this lately lives, though its lock cannot be seen from here
_TAIL_BYTES = 1 << 16
_DEPTH = 4  # folders below a root in which runs are looked for


@dataclass(frozen=True)
class RunRecord:
    """One run, as its directory and the queue show it."""

    run: str
    state: str  # running | stale | queued | finished | paused | stopped | failed | new
    step: int = 0
    total_steps: int | None = None
    samples: int = 0  # at the newest checkpoint
    loss: float | None = None  # of the last training step
    samples_per_s: float | None = None
    checkpoint: int | None = None  # step of the newest one
    checkpoint_age_s: float | None = None
    attempts: int = 0  # starts, those too that ended before training; a requeue is one more
    job: str = ""
    evaluation: Mapping[str, float] = field(default_factory=dict)  # at the newest checkpoint that has one
    began: Mapping[str, Any] | None = None  # {checkpoint, step} of another run that this one began in
    note: str = ""
    last_end: str = ""  # on Slurm: what was said of the last start's end, and why


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of the run's metrics.jsonl, none before its first step. Raises ConfigError without a run."""
    if not run.is_dir():
        raise ConfigError(f"{run}: no run directory there")
    file = run / "metrics.jsonl"
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def throughput(lines: Sequence[dict[str, Any]]) -> float | None:
    """Samples a second: the median step's, so that a start or a save does not count."""
    rates = [line["samples_per_s"] for line in lines if line.get("samples_per_s") is not None]
    return statistics.median(rates) if rates else None


def text(run: Path, jobs: Mapping[str, str] | None = None) -> str:
    """The run in a few lines: how it stands and why, how far, how fast, where, how to look at it and how to remove it.

    jobs: what `queue` returned.
    """
    lines = metrics(run)
    last = lines[-1] if lines else {}
    rate = throughput(lines)
    speed = "" if rate is None else f"{rate:.0f} samples/s"
    where = f"step {last['step']}, {_loss(last['loss'])}" if lines else "no step yet"
    found = record(run, jobs)
    age = "" if found.checkpoint_age_s is None else f", {_span(found.checkpoint_age_s)} ago"
    look = f"{_beside_python('tensorboard')} --logdir {run / 'tensorboard'}"
    rows = {
        "state": f"{found.state}: {found.note}" if found.note else found.state,
        "ended": "" if found.last_end == found.note else found.last_end,
        "starts": str(found.attempts),
        "job": found.job,
        "saved": "" if found.checkpoint is None else f"step {found.checkpoint}{age}",
        "trained": where,
        "speed": speed,
        "run": str(run),
        "look": look,
        "remove": f"rm -r {run}",
    }
    return "\n".join(f"{key:<8} {value}" for key, value in rows.items() if value)


def _loss(value: float | None) -> str:
    return "loss not finite" if value is None else f"loss {value:.4f}"  # JSON has no NaN: null stands for it


def _beside_python(name: str) -> str:
    """The command `name` of this environment, as short as it can be written from here."""
    path = Path(sys.executable).parent / name
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def is_run(path: Path) -> bool:
    """True for a directory that some start has owned, or that was made for one."""
    return (
        (path / "attempts.jsonl").exists() or (path / "metrics.jsonl").exists() or (path / "slurm").is_dir()
    )


def find_runs(root: Path, depth: int = _DEPTH) -> Iterator[Path]:
    """The run directories at or below `root`, in the order of their names; a sweep's in the order of its points."""
    if (root / SWEEP).exists():  # first: on Slurm it has a folder slurm/ too
        points = json.loads((root / SWEEP).read_text())["points"]
        yield from (root / point["name"] for point in points)  # those that have not begun too
    elif is_run(root):
        yield root
    elif depth > 0:
        for entry in sorted(root.iterdir()):
            if entry.is_dir() and not entry.is_symlink():
                yield from find_runs(entry, depth - 1)


def newest(run: Path) -> Meta | None:
    """What the newest checkpoint with a good manifest says of itself; its files are not verified."""
    for path in reversed(store.list_checkpoints(run / "checkpoints")):
        try:
            return store.read_manifest(path).meta
        except CheckpointError:
            continue  # the trainer sets it aside, and goes on from the one before
    return None


def is_finished(meta: Meta) -> bool:
    """True where the run that wrote this has spent its samples, or its patience."""
    total = meta.extra.get("total_samples")
    patience = meta.extra.get("config", {}).get("eval", {}).get("patience", 0)
    out_of_patience = patience > 0 and meta.state.get("evals_since_best", 0) >= patience
    return out_of_patience or (total is not None and meta.samples >= total)


def has_reached(meta: Meta, max_steps: int | None) -> bool:
    """True where a start with run.max_steps would find nothing to do."""
    return is_finished(meta) or (max_steps is not None and meta.step >= max_steps)


def is_locked(run: Path) -> bool:
    """True while a living process of this machine, or of one that shares its locks, owns the run."""
    try:
        descriptor = os.open(run / "lock", os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        # Shared, and let go at once: an owner that wants it meanwhile tries again.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def tail(run: Path) -> list[dict[str, Any]]:
    """The last whole lines of metrics.jsonl; none before the first step. Cheap for a run of any length."""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    if size > _TAIL_BYTES:
        lines = lines[1:]  # begins in the middle
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def queue() -> dict[str, str] | None:
    """This user's jobs in Slurm's queue: id (of an array's element: ARRAY_INDEX) → state; None without Slurm."""
    told = slurm.call(["squeue", "--me", "--noheader", "--array", "--format=%i|%T"])
    if told is None:
        return None
    if told.returncode:
        why = slurm.complaint(told.stderr).rpartition("; ")[2]
        print(f"squeue cannot be asked: {why}", file=sys.stderr)
        return None
    return dict(line.split("|", 1) for line in told.stdout.split())


def job_of(run: Path) -> str:
    """Slurm's id of the run's last submission, "" where there was none; a sweep keeps those of its points."""
    file = run.parent / "points" / f"{run.name}.job"
    job = file.read_text().strip() if file.exists() else ""
    if not job:
        submitted = sorted(run.glob("slurm/*/*_submitted.pkl"), key=lambda path: path.stat().st_mtime)
        job = submitted[-1].name.removesuffix("_submitted.pkl") if submitted else ""
    line = ledger.last(run)
    return line.successor if line is not None and line.event == "resubmitted" else job


def record(run: Path, jobs: Mapping[str, str] | None = None) -> RunRecord:
    """Look at one run; `jobs` is what `queue` returned."""
    last = last_attempt(run)
    told = ledger.read(run)
    end = next((line for line in reversed(told) if line.event == "end"), None)
    meta, lines = newest(run), tail(run)
    line = lines[-1] if lines else {}
    state, note = _state(run, last, meta, int(line.get("step", 0)), jobs)
    return RunRecord(
        run=str(run),
        state=state,
        step=max(int(line.get("step", 0)), meta.step if meta else 0),
        total_steps=_total_steps(meta) if meta else None,
        samples=meta.samples if meta else 0,
        loss=line.get("loss"),
        samples_per_s=throughput(lines),
        checkpoint=meta.step if meta else None,
        checkpoint_age_s=_age(store.directory(run / "checkpoints", meta.step)) if meta else None,
        attempts=_starts(run, told),
        job=last.job if last else job_of(run),
        evaluation=_evaluation(lines, meta),
        began=meta.extra.get("began") if meta else None,
        note=note,
        last_end=f"{end.verdict}: {end.why}" if end else "",
    )


def _starts(run: Path, told: Sequence[ledger.Line]) -> int:
    # "begin" comes before training, which may not have been reached.
    begun = [line for line in told if line.event == "begin"]
    on_slurm = {line.job for line in begun}
    return len(begun) + sum(attempt.job not in on_slurm for attempt in attempts(run))


def _state(
    run: Path, last: Attempt | None, meta: Meta | None, step: int, jobs: Mapping[str, str] | None
) -> tuple[str, str]:
    silent = min(
        (_age(p) for p in (run / "metrics.jsonl", run / "train.log", *run.glob("alive/*"))), default=0
    )
    elsewhere = last is not None and last.host != socket.gethostname() and silent < _FRESH_S
    if last is not None and last.job and jobs is not None:
        elsewhere = False  # the queue knows better
    in_queue = (jobs.get(job_of(run)) or jobs.get(last.job if last else "")) if jobs else None
    if is_locked(run):
        return ("stale", f"{last}: no word for {_span(silent)}") if silent > STALE_S else ("running", "")
    if in_queue == "PENDING":
        return "queued", ""
    if in_queue is not None or (elsewhere and not (meta and is_finished(meta))):
        return "running", ""
    if meta is not None and is_finished(meta):
        return "finished", ""
    wanted = meta.extra.get("config", {}).get("run", {}).get("max_steps") if meta else None
    if meta is not None and has_reached(meta, wanted):
        return "paused", f"at run.max_steps={wanted}"
    why = stopped_for(run, last)
    if why:
        return "failed", why
    if meta is not None and meta.step >= step:
        return "stopped", "saved; the same command goes on"
    if last is not None:
        return "failed", f"ended without a save, killed or crashed: {run / 'train.log'}"
    line = ledger.last(run)
    if line is not None:  # no start has reached training
        ended = line.event == "end"
        told = f"{line.verdict}: {line.why}" if ended else "the last start has not ended in order"
        return "stopped", f"before training; {told}"
    return "new", ""


def stopped_for(run: Path, last: Attempt | None) -> str:
    """Why the run's last start on Slurm was its last one; "" where it may go on, or was never there."""
    line = ledger.last(run)
    # The ledger's times are whole seconds.
    if line is None or line.verdict != "stop" or (last is not None and line.at[:19] < last.started[:19]):
        return ""
    return line.why or f"exit code {line.code}"


def _age(path: Path) -> float:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except FileNotFoundError:  # retired or not written yet
        return math.inf


def _total_steps(meta: Meta) -> int | None:
    total = meta.extra.get("total_samples")
    batch = meta.extra.get("config", {}).get("data", {}).get("global_batch")
    return None if total is None or not batch else meta.step + -(-max(0, total - meta.samples) // batch)


def _evaluation(lines: Sequence[Mapping[str, Any]], meta: Meta | None) -> dict[str, float]:
    for line in reversed(lines):
        found = {key: float(v) for key, v in line.items() if key.startswith("eval/") and v is not None}
        if found:
            return found
    return dict(meta.metrics) if meta else {}


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of words in columns, the first row their names."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(w.ljust(n) for w, n in zip(row, widths, strict=True)).rstrip() for row in rows)


def overview(records: Iterable[RunRecord]) -> str:
    """One line a run."""
    rows = [("run", "state", "step", "loss", "eval", "samples/s", "checkpoint", "starts", "job", "note")]
    for found in records:
        of = "" if found.total_steps is None else f"/{found.total_steps}"
        age = "" if found.checkpoint_age_s is None else f", {_span(found.checkpoint_age_s)} ago"
        rows.append(
            (
                found.run,
                found.state,
                f"{found.step}{of}",
                "" if found.loss is None else f"{found.loss:.4f}",
                brief(found.evaluation),
                "" if found.samples_per_s is None else f"{found.samples_per_s:.0f}",
                "" if found.checkpoint is None else f"{found.checkpoint}{age}",
                str(found.attempts),
                found.job,
                found.note,
            )
        )
    return table(rows)


def brief(evaluation: Mapping[str, float]) -> str:
    """The averaged weights' top-1, or the raw ones'."""
    for weights in ("ema", "raw"):
        if (top1 := evaluation.get(f"eval/{weights}/top1")) is not None:
            return f"{top1:.2f}%"
    return ""


def _span(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _queue_for(runs: Sequence[Path]) -> dict[str, str] | None:
    """The queue, where one of the runs has been there: a machine may have Slurm's commands and no cluster."""
    return queue() if any(_was_submitted(run) for run in runs) else None


def _was_submitted(run: Path) -> bool:
    in_array = (run.parent / "points" / f"{run.name}.job").exists()
    return in_array or any(run.glob("slurm/*/*_submission.sh")) or ledger.last(run) is not None


def main(words: Sequence[str]) -> int:
    """Say how runs are: a table of those at or below the folders named, or all about the one run named."""
    paths = [Path(word) for word in words if word != "--json"]
    if not paths and not Path(ROOT).is_dir():
        raise ConfigError(f"no folder {ROOT} here: name run directories, or a folder of them")
    paths = paths or [Path(ROOT)]
    for path in paths:
        if not path.is_dir():
            raise ConfigError(f"{path}: no run directory there")
    runs = [run for path in paths for run in find_runs(path)]
    if "--json" not in words and len(paths) == 1 and len(words) == 1 and runs == paths:
        print(text(paths[0], _queue_for(runs)))
        return 0
    jobs = _queue_for(runs)
    records = [record(run, jobs) for run in runs]
    if "--json" in words:
        print(json.dumps([asdict(found) for found in records], indent=1))
    else:
        print(overview(records) if records else f"no runs below {', '.join(map(str, paths))}")
    return 0
