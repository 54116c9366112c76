"""Many runs with one command: a grid or a table of points, each an ordinary run in a directory of its own.

Law: what a sweep knows, it reads from its run directories. A point is finished when its newest checkpoint says so,
so a sweep that was killed at any time goes on by the same command, and repeats nothing that has finished.

Below the sweep's folder (run.dir):

    NAME/               the run directory of a point
    points/NAME.yaml    the whole config of that run: `vmamba train config=…` runs it alone
    points/NAME.log     what its processes printed
    points/NAME.json    how its last start here ended
    points/NAME.job     its last id in Slurm's queue
    points/lock         held by the sweep that is at work here
    slurm/, code/       what arrays print, and the code that they run
    sweep.json          the command and the points
    results.csv         a line a point
"""

from __future__ import annotations

import csv
import ctypes
import fcntl
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vmamba_dist.cluster import arrays, status
from vmamba_dist.cluster.follow import REQUEUE, Requests
from vmamba_dist.cluster.job import code_folder
from vmamba_dist.cluster.points import (
    RECORDS,
    Branch,
    Planned,
    Point,
    Sweep,
    checkpoint_of,
    from_csv,
    grid,
    plan,
    write,
)
from vmamba_dist.cluster.status import RunRecord
from vmamba_dist.config import Config, ConfigError, UserError, load_beside, to_yaml, trajectory

FAILED = 1
_POLL_S = 0.2
_SLURM_POLL_S = 3.0
_ALIVE = ("running", "stale", "queued")
_PR_SET_PDEATHSIG = 1


class SweepBusy(UserError, RuntimeError):
    """Another process works on this sweep."""


@dataclass(frozen=True)
class PointResult:
    """How a point stands."""

    planned: Planned
    state: str  # finished | running | stale | queued | stopped | failed | missing
    record: RunRecord
    reason: str = ""

    @property
    def point(self) -> Point:
        return self.planned.point

    @property
    def run(self) -> Path:
        return self.planned.run


def run_points(
    points: Sequence[Point],
    *,
    base: Config,
    folder: Path,
    parallel: int = 1,
    command: str = "",
    follow: bool = True,
    beside: Sequence[PointResult] = (),
) -> list[PointResult]:
    """Run every point that has not finished, `parallel` at a time, and return how all of them stand.

    Here as processes of this machine, or with launch.cluster=slurm as an array, which `follow` waits for. One point's
    failure stops no other. Ctrl-C asks processes here to save and end, and leaves an array alone; either way the same
    call goes on. Writes results.csv, with the rows of `beside` first. Raises ConfigError before anything starts,
    SweepBusy where another process is at work there.
    """
    sweep = Sweep(folder, plan(points, base, folder), parallel, command)
    check_runs(sweep.planned)
    gpus = [] if base.launch.on_slurm else devices(sweep)
    with owned(folder):
        write_plan(sweep, [result.planned for result in beside])
        if base.launch.on_slurm:
            _run_on_slurm(sweep, follow=follow)
        else:
            _run_here(sweep, gpus)
        results = gather(sweep, status.queue() if base.launch.on_slurm else None)
        write_results(sweep, [*beside, *results])
    return results


def check_runs(planned: Sequence[Planned]) -> None:
    """Refuse a config that differs from the one that a point's run directory was trained with."""
    for one in planned:
        meta = status.newest(one.run)
        if meta is None or one.config.run.allow_changes:
            continue
        now = trajectory(one.config)
        changed = [
            f"{key} was {was!r}, now {now[key]!r}"
            for key, was in meta.trajectory.items()
            if key in now and now[key] != was
        ]
        if changed:
            raise ConfigError(
                f"point {one.point.name}: {one.run} was trained with another config: {'; '.join(changed)}. Put it "
                "back, use another run.dir, or run.allow_changes=true to take what is there"
            )


def gather(sweep: Sweep, jobs: Mapping[str, str] | None = None) -> list[PointResult]:
    """How every point stands, from its run directory, its last end and the queue."""
    return [_result(sweep, one, jobs) for one in sweep.planned]


def _result(sweep: Sweep, one: Planned, jobs: Mapping[str, str] | None) -> PointResult:
    record = status.record(one.run, jobs)
    if record.state in ("running", "stale", "queued"):
        return PointResult(one, record.state, record, record.note)
    if is_done(one):
        return PointResult(one, "finished", record)
    end = _last_end(sweep, one)
    if end and end["exit_code"] not in (0, REQUEUE):
        return PointResult(one, "failed", record, str(end["reason"]))
    if record.state == "new":
        return PointResult(one, "missing", record)
    if record.state == "failed" and not end:
        return PointResult(one, "failed", record, record.note)
    return PointResult(one, "stopped", record)


def is_done(one: Planned) -> bool:
    """True where nobody works on the point and its newest checkpoint is all that was asked for."""
    meta = status.newest(one.run)
    return (
        meta is not None
        and status.has_reached(meta, one.config.run.max_steps)
        and not status.is_locked(one.run)
    )


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Be the only sweep at work in a folder. Raises SweepBusy."""
    (folder / RECORDS).mkdir(parents=True, exist_ok=True)
    with (folder / RECORDS / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise SweepBusy(
                f"a sweep is at work in {folder} (pid {lock.read().strip()}); stop it first"
            ) from error
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def write_plan(sweep: Sweep, beside: Sequence[Planned] = ()) -> None:
    """Write the points, and the config of each, for the sweep's processes and for whoever looks."""
    points = [asdict(one.point) for one in (*beside, *sweep.planned)]
    content = {"command": sweep.command, "points": points}
    write(sweep.folder / status.SWEEP, json.dumps(content, indent=1) + "\n")
    for one in sweep.planned:
        write(sweep.file(one, "yaml"), to_yaml(one.config))


def write_results(sweep: Sweep, results: Sequence[PointResult]) -> Path:
    """Write results.csv: a point's keys, final metrics, state and run directory."""
    rows = [row(result) for result in results]
    columns = dict.fromkeys(key for each in rows for key in each)
    # The metrics that only some points have would stand behind the others' last columns.
    order = sorted(columns, key=lambda key: _PLACES.index(_place(key)))
    text = io.StringIO()
    writer = csv.DictWriter(text, order, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path = sweep.folder / "results.csv"
    write(path, text.getvalue())
    return path


_BEHIND = ("samples_per_s", "starts", "branched_from", "branched_step", "run_dir", "reason")
_PLACES = ("name", "keys", "state", "step", "samples", "loss", "eval", *_BEHIND)


def _place(column: str) -> str:
    if column in _PLACES:
        return column
    return "eval" if column.startswith("eval/") else "keys"


def row(result: PointResult) -> dict[str, Any]:
    """A point as a line of results.csv."""
    found, began = result.record, result.record.began
    return {
        "name": result.point.name,
        **dict(word.split("=", 1) for word in result.point.words),
        "state": result.state,
        "step": found.step,
        "samples": found.samples,
        "loss": found.loss,
        **found.evaluation,
        "samples_per_s": found.samples_per_s,
        "starts": found.attempts,
        **({"branched_from": began["checkpoint"], "branched_step": began["step"]} if began else {}),
        "run_dir": str(result.run),
        "reason": result.reason,
    }


def overview(results: Sequence[PointResult]) -> str:
    """One line a point."""
    rows = [("point", "state", "step", "loss", "eval", "why")]
    for each in results:
        found = each.record
        loss = "" if found.loss is None else f"{found.loss:.4f}"
        rows.append(
            (each.point.name, each.state, str(found.step), loss, status.brief(found.evaluation), each.reason)
        )
    return status.table(rows)


def exit_code(results: Sequence[PointResult]) -> int:
    """0 where all have finished, 1 where one has failed, else 75: the same command goes on."""
    states = {result.state for result in results}
    return 0 if states <= {"finished"} else FAILED if "failed" in states else REQUEUE


@dataclass
class _Child:
    """A point's process."""

    one: Planned
    process: subprocess.Popen[bytes]
    slot: int


def _run_here(sweep: Sweep, gpus: Sequence[str]) -> None:
    """Run what has not finished on this machine."""
    waiting = [one for one in sweep.planned if not is_done(one)]
    done = len(sweep.planned) - len(waiting)
    if done:
        print(f"{done} of {len(sweep.planned)} points have finished already", flush=True)
    requests, heard = Requests(), 0
    running: list[_Child] = []
    told: set[str] = set()
    with requests.listening():
        while running or (waiting and not requests.count):
            while len(running) < sweep.parallel and not requests.count:
                one = _next(sweep, waiting, running, told)
                if one is None:
                    break
                waiting.remove(one)
                slot = min(set(range(sweep.parallel)) - {child.slot for child in running})
                running.append(_start(sweep, one, slot, gpus))
            if requests.count > heard:
                heard = requests.count
                print(
                    "stopping: every point saves and ends (once more kills them)" if heard == 1 else "killed"
                )
                for child in running:
                    child.process.send_signal(signal.SIGTERM if heard == 1 else signal.SIGKILL)
            for child in [child for child in running if child.process.poll() is not None]:
                running.remove(child)
                _ended(sweep, child, asked=requests.count > 0)
            time.sleep(_POLL_S)
    if requests.count:
        print(f"stopped; to go on: {sweep.command}", flush=True)


def _next(sweep: Sweep, waiting: list[Planned], running: Sequence[_Child], told: set[str]) -> Planned | None:
    """The first waiting point that can start now. Takes those out of `waiting` that never can."""
    coming = {one.point.name for one in waiting} | {child.one.point.name for child in running}
    for one in list(waiting):
        branch = one.point.branch
        if status.is_locked(one.run):  # by an earlier sweep's process that still saves, or by somebody's hand
            if one.point.name not in told:
                told.add(one.point.name)
                print(f"{one.point.name} waits: its run directory is in use", flush=True)
            continue
        if branch is None or status.newest(one.run) or checkpoint_of(sweep.folder, branch).is_dir():
            return one
        if branch.of not in coming:
            waiting.remove(one)
            _cannot_begin(sweep, one, branch)
    return None


def _cannot_begin(sweep: Sweep, one: Planned, branch: Branch) -> None:
    missing = f"it begins in step {branch.step} of {branch.of}, which has not been saved"
    _note_end(sweep, one, FAILED, missing)
    print(f"{one.point.name} cannot start: {missing}", flush=True)


def _start(sweep: Sweep, one: Planned, slot: int, gpus: Sequence[str]) -> _Child:
    launch = one.config.launch
    cores = len(os.sched_getaffinity(0))
    environ = {"OMP_NUM_THREADS": str(max(1, cores // (sweep.parallel * launch.tasks))), **os.environ}
    if gpus:
        mine = gpus[slot * launch.gpus_per_node : (slot + 1) * launch.gpus_per_node]
        environ["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
    sweep.file(one, "json").unlink(missing_ok=True)
    with sweep.file(one, "log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "vmamba_dist.cli", "train", f"config={sweep.file(one, 'yaml')}"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environ,
            start_new_session=True,  # the terminal's Ctrl-C is for the sweep, which asks every point once
            preexec_fn=_stop_with(os.getpid()),
        )
    print(f"{one.point.name} begins", flush=True)
    return _Child(one, process, slot)


def _stop_with(parent: int) -> Any:
    """What a child does first: have the kernel ask it to save and end when the sweep dies, however it dies."""
    libc = ctypes.CDLL(None, use_errno=True)  # loaded here: after a fork little is safe

    def ask() -> None:
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM) != 0 or os.getppid() != parent:
            os._exit(FAILED)

    return ask


def devices(sweep: Sweep) -> list[str]:
    """The GPUs to deal out, where the points ask for any. Raises ConfigError where they are too few."""
    each = sweep.planned[0].config.launch.gpus_per_node  # launch.* is no key to sweep
    if not each:
        return []
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is None:
        there = sorted(int(file.name[6:]) for file in Path("/dev").glob("nvidia[0-9]*"))
        found = [str(number) for number in there]
    else:
        found = [name for name in shown.split(",") if name]
    if len(found) < each * sweep.parallel:
        raise ConfigError(
            f"sweep.parallel={sweep.parallel} × launch.gpus_per_node={each} is more than the {len(found)} GPUs "
            f"that are here; use sweep.parallel={max(1, len(found) // each)}"
        )
    return found


def _ended(sweep: Sweep, child: _Child, *, asked: bool) -> None:
    code = child.process.returncode
    if asked and code < 0:  # it had not begun to listen: nothing of it was to be saved
        code = REQUEUE
    reason = "" if code in (0, REQUEUE) else _last_words(sweep.file(child.one, "log"), code)
    _note_end(sweep, child.one, code, reason)
    result = _result(sweep, child.one, None)
    seen = status.brief(result.record.evaluation) or result.reason
    print(f"{child.one.point.name} {result.state} at step {result.record.step}  {seen}".rstrip(), flush=True)


def _last_words(log: Path, code: int) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    told = [line.removeprefix("vmamba: ") for line in lines if line.startswith("vmamba: ")]
    return told[-1] if told and code == 2 else lines[-1].strip() if lines else f"exit code {code}"


def _note_end(sweep: Sweep, one: Planned, code: int, reason: str) -> None:
    write(
        sweep.file(one, "json"), json.dumps({"exit_code": code, "reason": reason, "at": time.time()}) + "\n"
    )


def _last_end(sweep: Sweep, one: Planned) -> dict[str, Any] | None:
    file = sweep.file(one, "json")
    if not file.exists():
        return None
    found = json.loads(file.read_text())
    assert isinstance(found, dict)
    return found


def _run_on_slurm(sweep: Sweep, *, follow: bool) -> None:
    """Queue what has not finished and is not in the queue already."""
    jobs = status.queue()
    if jobs is None:  # what cannot be seen would be queued a second time
        raise ConfigError(
            "launch.cluster=slurm: the queue cannot be seen from here (squeue); on a login node, try again"
        )
    now = gather(sweep, jobs)
    there = {result.point.name for result in now if result.state in _ALIVE}
    todo = [result.planned for result in now if result.state not in (*_ALIVE, "finished")]
    coming = there | {one.point.name for one in todo}
    for one in list(todo):
        branch = one.point.branch
        begun = branch is None or status.newest(one.run) or checkpoint_of(sweep.folder, branch).is_dir()
        if branch is not None and not begun and branch.of not in coming:
            todo.remove(one)
            _cannot_begin(sweep, one, branch)
    finished = len(now) - len(there) - len(todo)
    print(f"{len(now)} points: {finished} finished, {len(there)} queued or running already", flush=True)
    queued = arrays.submit(sweep, todo, there)
    if queued:
        told = {
            "arrays": f"{', '.join(queued)}: {len(todo)} points, {sweep.parallel} at a time",
            "look": f"vmamba runs {shlex.quote(str(sweep.folder))}",
            "cancel": f"scancel {' '.join(queued)}",
            "gather": f"{sweep.command}  # runs again what failed, and nothing that has finished",
        }
        print("\n".join(f"{key:<8} {value}" for key, value in told.items()), flush=True)
    if follow:
        _watch(sweep)


def _watch(sweep: Sweep) -> None:
    """Tell how points fare until none is queued or running; Ctrl-C leaves them alone."""
    told: dict[str, str] = {}
    quiet = 0
    try:
        while quiet < 2:  # twice: a job that is requeued may look ended for a moment
            time.sleep(_SLURM_POLL_S)
            jobs = status.queue()
            if jobs is None:
                continue
            now = gather(sweep, jobs)
            for result in now:
                if told.get(result.point.name) != result.state:
                    told[result.point.name] = result.state
                    print(f"{result.point.name} {result.state}  {result.reason}".rstrip(), flush=True)
            alive = any(result.state in _ALIVE for result in now)
            quiet = 0 if alive else quiet + 1
    except KeyboardInterrupt:
        print("the jobs go on", flush=True)


def take_parallel(said: dict[str, Any]) -> int:
    """Take sweep.parallel out of what was said of the group. Raises ConfigError."""
    parallel = said.pop("parallel", 1)
    if type(parallel) is not int or parallel < 1:
        raise ConfigError(f"sweep.parallel={parallel!r}: points at a time; use 1 or more")
    return parallel


def read_words(words: Sequence[str]) -> tuple[list[Point], Config, int]:
    """The points, the config that they share and sweep.parallel, of a command line. Raises ConfigError."""
    base, said = load_beside(words, "sweep")
    parallel = take_parallel(said)
    table = said.pop("points", None)
    if table is not None and said:
        raise ConfigError(
            f"sweep.points={table} beside sweep.{next(iter(said))}: use a table of points, or lists"
        )
    points = grid(said) if table is None else from_csv(Path(str(table)))
    if table is None and not said:
        raise ConfigError(
            "nothing to sweep: give lists, sweep.optim.lr=[1e-3,2e-3], or a table, sweep.points=FILE.csv"
        )
    return points, base, parallel


def main(words: Sequence[str]) -> int:
    """Run a sweep; return 0 when all points have finished, 1 where one failed, 75 where it was stopped."""
    flags = {"--dry-run", "--follow"} & set(words)
    words = [word for word in words if word not in flags]
    points, base, parallel = read_words(words)
    folder = Path(base.run.dir)
    if "--dry-run" in flags:
        sweep = Sweep(folder, plan(points, base, folder), parallel, "")
        check_runs(sweep.planned)
        rows = [
            (each.point.name, each.state, " ".join(each.point.words))
            for each in gather(sweep, status.queue())
        ]
        print(status.table([("point", "state", "config"), *rows]))
        print(f"\n{len(points)} points, {parallel} at a time, below {folder}")
        return 0
    command = shlex.join([sys.executable, str(code_folder() / "launch" / "sweep.py"), *words])
    follow = not base.launch.on_slurm or "--follow" in flags or base.launch.follow is True
    results = run_points(points, base=base, folder=folder, parallel=parallel, command=command, follow=follow)
    print(f"\n{overview(results)}\n\nresults  {folder / 'results.csv'}")
    return exit_code(results) if follow else 0
