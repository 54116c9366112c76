"""Saving, finding and loading checkpoints, by all ranks together.

Law: what `newest` returns is bit-equal to what some `save` was given, whenever that save was killed and
whatever has happened to its files since. A failure on one rank is the same error on every rank.

The order of a save is the whole safety: an empty step-N.tmp, the data files (each rank writes the chunks
dealt to it, fsynced), the sha256 of each file taken by the rank that wrote it, the index, manifest.json
with fsync, the question whether a later attempt has begun, the rename, fsync of the parent, retention.
The hash is of the file read back after its fsync; on the writer's node the bytes come from the page cache,
so it costs the hashing alone. DCP has no checksum of its own: it loads a flipped bit silently.

All of that happens on a thread of its own while training goes on, from copies, and its collectives over a
process group of its own. A save that could not be written is told, counted and forgotten, until too many
have failed in a row; one that a run ends with, or that finds a later attempt, is an error of the run.
How it went is agreed on when it is waited for, since a rank may give up where another one got through.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.storage import WriteResult

from vmamba_dist.checkpoint import dcp, store
from vmamba_dist.checkpoint.chunks import Chunk, Known, Part, Staging, deal, held
from vmamba_dist.checkpoint.store import CheckpointError, Damaged, Fault, FileRecord, Manifest, Meta
from vmamba_dist.config.schema import CheckpointConfig
from vmamba_dist.core.dist import World, from_main, gather, gather_on_main, is_of_a_collective, new_group
from vmamba_dist.core.rundir import RunDir, Superseded

_log = logging.getLogger(__name__)
T = TypeVar("T")
_PATIENCE_S = 60.0  # between two words about a save that the run waits for

_FIXES = {
    errno.ENOSPC: "free space there, or keep fewer with checkpoint.keep and checkpoint.keep_every",
    errno.EDQUOT: "raise the quota there, or keep fewer with checkpoint.keep and checkpoint.keep_every",
    errno.EFBIG: "raise the limit on a file's size (ulimit -f)",
    errno.EROFS: "mount it writable, or take another run.dir",
    errno.EACCES: "let this user write there, or take another run.dir",
    errno.EPERM: "let this user write there, or take another run.dir",
    errno.ENOTDIR: "something else has a directory's place there: move it away",
    errno.ENOMEM: "free some memory, or set checkpoint.async_save=false, which copies nothing",
    errno.EEXIST: "something else has a directory's place there: move it away",
}


@dataclass(frozen=True)
class Found:
    """A checkpoint that all ranks have verified."""

    path: Path
    manifest: Manifest

    @property
    def meta(self) -> Meta:
        return self.manifest.meta


@dataclass(frozen=True)
class _Failure:
    rank: int
    superseded: bool
    text: str


@dataclass(frozen=True)
class _Outcome:
    """How one rank's part of a save went."""

    failure: str = ""  # told by all ranks alike: no checkpoint
    lost: bool = False  # the others were waited for in vain, or left
    fatal: str = ""  # what no further save can mend
    superseded: bool = False  # and why
    slowest: tuple[float, str] = (0.0, "")  # this rank's own longest stretch, seconds and what it did


class Checkpoints:
    """The checkpoints of one run. Every method but `close` is a collective."""

    def __init__(
        self, run: RunDir, cfg: CheckpointConfig, world: World, *, metric: str = "", timeout_s: float = 600.0
    ) -> None:
        """`metric` is the key of Meta.metrics that `keep_best` goes by (…loss: small is better).

        A rank that waits longer than `timeout_s` (parallel.timeout_s) for what another one writes gives that save up.
        """
        self.run = run
        self.cfg = cfg
        self.world = world
        self.metric = metric
        self.failures = 0  # in a row
        self._timeout_s = timeout_s
        self._group = new_group(timeout_s)  # the thread's own
        self._broken = False  # the group: gloo's is of no use once a collective in it has failed
        self._thread: threading.Thread | None = None
        self._saving: tuple[int, Path] | None = None  # what the thread saves
        self._outcome = _Outcome()
        self._slowest = (0.0, "")
        self._lost_at = 0.0  # monotonic
        self._failure: CheckpointError | None = None  # of the last save
        self._fatal: BaseException | None = None
        self._staging = Staging(world.device)
        self._known: Known = {}
        self._chunks: list[Chunk] = []  # that this rank holds, and their digest
        self._digest = ""
        self._digests: list[str] = []  # all ranks', and what follows from what they hold:
        self._all: list[Chunk] = []  # every chunk there is
        self._picks: list[int] = []  # which of its own this rank writes

    def save(
        self,
        tensors: Mapping[str, Tensor],
        meta: Meta,
        *,
        wait: bool = True,
        before: Callable[[], None] = lambda: None,
    ) -> Path:
        """Save the tensors as they are now as the checkpoint of meta.step; return its path.

        Returns once they are copied, and writes on while they may change; with `wait`, or without
        checkpoint.async_save, once all is written. A save in flight is waited for first. Tensors that several
        ranks have are written once, spread over them; DTensors by their owners; a tensor may also be with some
        ranks only. A whole checkpoint of that step is replaced. Each rank calls `before` first: what must be on the
        disk before the checkpoint is; an OSError there is a failure of this save.

        A failure leaves the earlier checkpoints as they are and no step-N.tmp. It is logged and counted; with
        `wait` it raises CheckpointError on all ranks, naming rank, path and cause, else at the
        checkpoint.max_failures-th in a row. Raises Superseded where a later attempt has begun.
        """
        self._settle()
        if not wait:  # the last save of a run is worth another try
            self._check_failures()
        final = store.directory(self.run.checkpoints, meta.step)

        def begin() -> None:
            if self.world.is_main:
                self.run.check_attempt()
            before()

        self._outcome = _Outcome()
        if self._broken:
            self._renew_group()
        try:
            _together(self.world, f"begin {final}", begin)
            self._start(tensors, meta, final, wait=wait)
        except CheckpointError as error:
            self._failed(meta.step, error)
        else:
            if not wait and self.cfg.async_save:
                return final
            self._settle()
        if wait and self._failure is not None:
            raise self._failure
        self._check_failures()
        return final

    def reserve(self, tensors: Mapping[str, Tensor]) -> None:
        """Make the memory for copies of these ready, in the background. A collective.

        Without it the first save halts training for as long as the system takes to find that memory.
        """
        if self.cfg.async_save:
            self.drain()
            chunks = [chunk for chunk, _ in self._mine(tensors)]
            try:
                self._staging.reserve(chunks)
            except OSError as error:  # a save tries again, and counts
                _log.warning("no memory for copies of checkpoints yet: %s", _told(error))

    def drain(self) -> None:
        """Wait for the save in flight; nothing happens where there is none.

        Raises CheckpointError where checkpoint.max_failures saves have failed in a row, Superseded where a later
        attempt has begun, and what else went wrong there.
        """
        self._settle()
        self._check_failures()

    def close(self) -> None:
        """Wait for this rank's part of the save in flight, on every way out of a run; errors are logged, not raised."""
        if self._thread is not None:
            while self._thread.is_alive():
                self._thread.join(_PATIENCE_S)
                if self._thread.is_alive() and self.world.is_main:
                    _log.info("waiting for %s", self._thread.name)
            self._thread = None
        if self._fatal is not None:
            _log.error("the last save ended with %s: %s", type(self._fatal).__name__, self._fatal)
        self._staging.release()

    def _settle(self) -> None:
        """Wait for the save in flight, on all ranks, and agree on how it went. A collective."""
        if self._thread is None or self._saving is None:  # so it is on all ranks
            return
        step, final = self._saving
        outcomes = self._await_all(self._thread, step, final)
        self._thread = self._saving = None
        if self._fatal is not None:
            fatal, self._fatal = self._fatal, None
            raise fatal
        for rank, outcome in enumerate(outcomes):
            if outcome.fatal:
                kind = Superseded if outcome.superseded else RuntimeError
                raise kind(outcome.fatal if outcome.superseded else f"rank {rank}: {outcome.fatal}")
        if any(outcome.lost for outcome in outcomes):
            self._broken = True
            if self.world.is_main:  # only now does nobody write there
                shutil.rmtree(store.temporary(final), ignore_errors=True)
            self._failed(step, CheckpointError(self._late(outcomes, final)))
            return
        failure = next((outcome.failure for outcome in outcomes if outcome.failure), "")
        if failure:
            self._failed(step, CheckpointError(failure))
        else:
            self.failures, self._failure = 0, None

    def _await_all(self, thread: threading.Thread, step: int, final: Path) -> list[_Outcome]:
        """Every rank's outcome, in rank order. A collective, in slices that end before it would time out itself.

        Raises CheckpointError naming the ranks that write on for parallel.timeout_s after others gave up.
        """
        while True:
            thread.join(min(_PATIENCE_S, self._timeout_s / 4))
            over = not thread.is_alive()
            waited = time.monotonic() - self._lost_at if over and self._outcome.lost else 0.0
            found = gather((self._outcome if over else None, waited))
            outcomes = [outcome for outcome, _ in found if outcome is not None]
            if len(outcomes) == len(found):
                return outcomes
            late = _ranks(rank for rank, (outcome, _) in enumerate(found) if outcome is None)
            longest = max(waited for _, waited in found)
            if longest > self._timeout_s:
                raise CheckpointError(
                    f"{late} still at work on {final}, {longest:.3g} s after others gave up: "
                    f"look at the storage there, or raise parallel.timeout_s={self._timeout_s:g}"
                )
            if self.world.is_main:
                _log.info("waiting for the save of step %d: %s not done", step, late)

    def _late(self, outcomes: Sequence[_Outcome], final: Path) -> str:
        """Who kept the others waiting, in words: each rank knows how long its own part took."""
        limit = self._timeout_s
        told = [
            f"rank {rank} took {seconds:.3g} s to {what}"
            for rank, (seconds, what) in enumerate(outcome.slowest for outcome in outcomes)
            if seconds > limit
        ]
        if not told:
            gave_up = _ranks(rank for rank, outcome in enumerate(outcomes) if outcome.lost)
            return (
                f"{gave_up} without the others while {final} was written, though no rank's part took "
                f"parallel.timeout_s={limit:g}: look at the network between them"
            )
        return (
            f"{_some(told)}, and the others wait no longer than parallel.timeout_s={limit:g}: "
            "look at the storage there, or raise parallel.timeout_s"
        )

    def _renew_group(self) -> None:
        """Make the thread a new group. A collective."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
        self._group = new_group(self._timeout_s)
        self._broken = False

    def _check_failures(self) -> None:
        if self.failures >= self.cfg.max_failures:
            raise CheckpointError(
                f"{self.failures} saves in a row failed, and checkpoint.max_failures={self.cfg.max_failures}; "
                f"the last: {self._failure}"
            ) from self._failure

    def _start(self, tensors: Mapping[str, Tensor], meta: Meta, final: Path, *, wait: bool) -> None:
        parts = self._mine(tensors)
        if not wait and self.cfg.async_save:
            parts = _together(self.world, f"copy for {final}", lambda: self._staging.copy(parts))
        self._thread = threading.Thread(
            target=self._run, args=(parts, meta, final), name=f"the save of step {meta.step}"
        )
        self._saving = meta.step, final
        self._thread.start()

    def _mine(self, tensors: Mapping[str, Tensor]) -> list[Part]:
        """The parts that this rank writes: dealt out once, and again where any rank holds something else.

        A collective.
        """
        parts = held(tensors, self._known)
        chunks = [chunk for chunk, _ in parts]
        if chunks != self._chunks:
            self._chunks, self._digest = chunks, hashlib.sha256(repr(chunks).encode()).hexdigest()
        digests = gather(self._digest)
        if digests != self._digests:
            alike = len(set(digests)) == 1
            dealt = deal([chunks] * self.world.size if alike else gather(chunks))
            own = set(dealt[self.world.rank])
            self._all = [chunk for each in dealt for chunk in each]
            self._picks = [i for i, chunk in enumerate(chunks) if chunk in own]
            self._digests = digests
        return [parts[i] for i in self._picks]

    def _run(self, mine: Sequence[Part], meta: Meta, final: Path) -> None:
        """Write and publish, and note how it went: `_settle` makes of it what holds for all ranks."""
        began = time.monotonic()
        self._slowest = (0.0, "")
        try:
            if self.world.device.type == "cuda":
                torch.cuda.set_device(self.world.device)  # a new thread's is the first, somebody else's
            self._staging.wait()
            self._publish_all(mine, meta, final)
        except CheckpointError as error:
            self._tell(meta.step, error)
            self._outcome = _Outcome(failure=str(error))
        except BaseException as error:  # noqa: BLE001 - raised again by _settle
            if isinstance(error, Exception) and is_of_a_collective(error):
                self._lost_at = time.monotonic()
                self._outcome = _Outcome(lost=True, slowest=self._slowest)
                if self.world.is_main:
                    _log.warning("step %d: the ranks lost one another in its save: %s", meta.step, error)
            else:
                self._fatal = error
                text = f"the save of step {meta.step} ended with {type(error).__name__}: {error}"
                self._outcome = _Outcome(
                    fatal=str(error) if isinstance(error, Superseded) else text,
                    superseded=isinstance(error, Superseded),
                )
        else:
            self._outcome = _Outcome(slowest=self._slowest)
            if self.world.is_main:
                _log.info("saved step %d, written in %.1f s", meta.step, time.monotonic() - began)

    def _publish_all(self, mine: Sequence[Part], meta: Meta, final: Path) -> None:
        path = store.temporary(final)
        rank = self.world.rank

        def write() -> tuple[list[WriteResult], dict[str, FileRecord]]:
            results = dcp.write_chunks({chunk: _source(tensor) for chunk, tensor in mine}, path, rank)
            return results, {file.name: store.describe(file) for file in dcp.own_files(path, rank)}

        try:
            self._part(f"prepare {path}", lambda: self._prepare(final) if self.world.is_main else None)
            written = self._part(f"write {path}", write)
            of_all = gather_on_main(written, self._group)
            self._part(
                f"publish {final}",
                lambda: self._publish(path, final, meta, of_all) if self.world.is_main else None,
            )
        except CheckpointError:
            if self.world.is_main:
                shutil.rmtree(path, ignore_errors=True)  # the error itself is what has to be seen
            raise
        if self.world.is_main:
            self._retire(final)

    def _part(self, what: str, action: Callable[[], T]) -> T:
        """A part of the save in the thread's group; how long this rank's own work took is kept. A collective."""

        def timed() -> T:
            began = time.monotonic()
            try:
                return action()
            finally:
                self._slowest = max(self._slowest, (time.monotonic() - began, what))

        return _together(self.world, what, timed, self._group)

    def _failed(self, step: int, error: CheckpointError) -> None:
        """Count a failed save, and tell it where the thread has not."""
        if str(error) != self._outcome.failure:
            self._tell(step, error)
        self.failures += 1
        self._failure = error

    def _tell(self, step: int, error: CheckpointError) -> None:
        if self.world.is_main:
            _log.error(
                "step %d was not saved (failure %d in a row; the run stops at checkpoint.max_failures=%d): %s",
                step,
                self.failures + 1,
                self.cfg.max_failures,
                error,
            )

    def newest(self, *, at: Path | None = None) -> Found | None:
        """Find and verify the newest whole checkpoint of this run; None where none was ever published.

        A damaged one is renamed step-N.corrupt-K, its faults are logged, and the one before is taken. Raises
        CheckpointError where there are only damaged ones: to begin anew would cut the run's metrics.
        With `at`, a checkpoint or a run directory, that one is meant: see `find`.
        """
        self.drain()
        if at is not None:
            return find(at, self.world)
        self._on_main(f"look into {self.run.checkpoints}", lambda: store.recover(self.run.checkpoints))
        for path in reversed(_list(self.run.checkpoints, self.world)):
            try:
                return _verified(path, self.world)
            except Damaged as damage:
                self._set_aside(path, damage)
        self._on_main(f"look into {self.run.checkpoints}", self._refuse_to_begin_anew)
        return None

    def load(self, found: Found, tensors: Mapping[str, Tensor], *, allow_unused: Sequence[str] = ()) -> None:
        """Fill the tensors in place from a checkpoint: see the function `load`."""
        load(found, tensors, self.world, allow_unused=allow_unused)

    def _refuse_to_begin_anew(self) -> None:
        damaged = sorted(path.name for path in self.run.checkpoints.glob("step-*.corrupt-*"))
        if damaged:
            raise CheckpointError(
                f"none is whole, only {_some(damaged)}: put a whole one there, take another run.dir, "
                "or remove them to begin anew at step 1"
            )

    def _prepare(self, final: Path) -> None:
        self.run.check_attempt()
        store.prepare(final)

    def _publish(
        self,
        path: Path,
        final: Path,
        meta: Meta,
        written: Sequence[tuple[list[WriteResult], dict[str, FileRecord]]],
    ) -> None:
        dcp.write_index(path, self._all, [results for results, _ in written])
        files = {name: record for _, records in written for name, record in records.items()}
        files[dcp.METADATA] = store.describe(path / dcp.METADATA)
        store.write_manifest(path, Manifest(meta, files))
        self.run.check_attempt()
        store.publish(path, final)

    def _retire(self, final: Path) -> None:
        cfg = self.cfg
        try:
            store.retire(
                self.run.checkpoints,
                final,
                keep=cfg.keep,
                keep_every=cfg.keep_every,
                keep_best=cfg.keep_best,
                metric=self.metric,
            )
        except OSError as error:  # the new checkpoint is good: no reason to end the run
            _log.warning("an old checkpoint in %s could not be deleted: %s", self.run.checkpoints, error)

    def _set_aside(self, path: Path, damage: Damaged) -> None:
        def rename() -> None:
            self.run.check_attempt()
            kept = store.set_aside(path)
            _log.warning("checkpoint %s is damaged, kept as %s: %s", path.name, kept.name, damage)

        self._on_main(f"set {path} aside", rename)

    def _on_main(self, what: str, action: Callable[[], None]) -> None:
        """Do on rank 0 what is its alone; an error there is raised everywhere."""
        _together(self.world, what, lambda: action() if self.world.is_main else None)


def find(at: str | Path, world: World) -> Found:
    """Verify a checkpoint that somebody named: its directory, or a run directory, for its newest whole one.

    A collective. Nothing is renamed, since it may be someone else's. Raises CheckpointError where none is
    there or all are damaged.
    """
    place = Path(at).absolute()
    if store.step_of(place) is not None or (place / store.MANIFEST).exists():
        candidates = [place]
    else:
        candidates = _list(place / "checkpoints" if (place / "checkpoints").is_dir() else place, world)
    if not candidates:
        raise CheckpointError(f"{place}: neither a checkpoint nor a run directory that holds one")
    damages = []
    for candidate in reversed(candidates):
        try:
            return _verified(candidate, world)
        except Damaged as damage:
            damages.append(f"checkpoint {candidate} is damaged: {damage}")
            _log.warning("%s", damages[-1])
    raise CheckpointError(f"{'; '.join(damages)}; name another one")


def load(
    found: Found, tensors: Mapping[str, Tensor], world: World, *, allow_unused: Sequence[str] = ()
) -> None:
    """Fill the tensors in place from a checkpoint saved at any world size. Collective.

    Names, shapes and dtypes must agree both ways; tensors of the checkpoint whose names begin with one of
    `allow_unused`, as "optim." for an evaluation, may stay unread. Raises CheckpointError naming the keys.
    """
    named = set().union(*gather(list(tensors)))
    _together(
        world, f"load {found.path}", lambda: _check_names(found.path, tensors, named, tuple(allow_unused))
    )
    _together(world, f"load {found.path}", lambda: dcp.fill(tensors, found.path))


def _source(tensor: Tensor) -> dcp.Source:
    return lambda: tensor.contiguous()


def _check_names(
    path: Path, tensors: Mapping[str, Tensor], named: set[str], allow_unused: tuple[str, ...]
) -> None:
    """`named` is what any rank asks for: a tensor may be with some ranks only."""
    stored = dcp.read_index(path)
    missing = sorted(name for name in named if name not in stored)
    unused = sorted(name for name in stored if name not in named and not name.startswith(allow_unused))
    differ = [
        f"{name} is {there}, here {here}"
        for name, tensor in sorted(tensors.items())
        if name in stored
        and (there := _kind(stored[name].shape, stored[name].dtype))
        != (here := _kind(tensor.shape, tensor.dtype))
    ]
    problems = []
    if missing:
        problems.append(f"it lacks {_some(missing)}")
    if unused:
        problems.append(f"nothing here takes its {_some(unused)}")
    if differ:
        problems.append(_some(differ))
    if problems:
        raise CheckpointError("; ".join(problems))


def _kind(shape: Sequence[int], dtype: torch.dtype) -> str:
    return f"{tuple(shape)} {str(dtype).removeprefix('torch.')}"


def _some(items: Sequence[str], most: int = 8) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def _ranks(ranks: Iterable[int]) -> str:
    """rank 3 is / ranks 3, 7 are."""
    numbers = [str(rank) for rank in ranks]
    return f"ranks {_some(numbers)} are" if len(numbers) > 1 else f"rank {numbers[0]} is"


def _list(checkpoints: Path, world: World) -> list[Path]:
    found = _together(
        world, f"list {checkpoints}", lambda: store.list_checkpoints(checkpoints) if world.is_main else []
    )
    return from_main(found)


def _verified(path: Path, world: World) -> Found:
    """Verify the checkpoint at `path`, each rank its share of the files; raise Damaged on all ranks."""
    manifest, damage = from_main(
        _together(world, f"read {path}", lambda: _manifest(path) if world.is_main else (None, ""))
    )
    if manifest is None:
        raise Damaged(damage)
    shares = store.share(manifest, world.rank, world.size)
    mine = _together(world, f"verify {path}", lambda: store.verify_files(path, manifest, shares))
    faults = [fault for each in gather(mine) for fault in each]
    if faults:
        # Rank 0 looks again: on storage that not all machines share, or share late, nothing is damaged.
        names = [fault.file for fault in faults]
        again = _together(
            world, f"verify {path}", lambda: _confirmed(path, manifest, names) if world.is_main else []
        )
        raise Damaged(", ".join(str(fault) for fault in from_main(again)))
    return Found(path, manifest)


def _manifest(path: Path) -> tuple[Manifest | None, str]:
    try:
        manifest = store.read_manifest(path)
        store.check_step(path, manifest)
    except Damaged as damage:
        return None, str(damage)
    return manifest, ""


def _confirmed(path: Path, manifest: Manifest, names: Sequence[str]) -> list[Fault]:
    faults = store.verify_files(path, manifest, names)
    if len(faults) < len(names):
        raise CheckpointError(
            f"other ranks find {_some(names)} damaged, rank 0 does not: "
            "put run.dir on storage that all machines share"
        )
    return faults


def _together(world: World, what: str, action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Do something on every rank; where it fails on any, raise the same error on all. A collective.

    Catches what storage and checkpoints cause; anything else is a defect and stays as it is.
    """
    failure: _Failure | None = None
    cause: BaseException | None = None
    result: list[T] = []
    try:
        result.append(action())
    except (OSError, CheckpointError, Superseded) as error:
        failure = _Failure(world.rank, isinstance(error, Superseded), _told(error))
        cause = error
    except CheckpointException as error:  # DCP has told every rank already, and is no Exception
        rank, (inner, _) = next(iter(error.failures.items()))
        failure = _Failure(rank, False, f"{type(inner).__name__}: {inner}")
        cause = error
    first = next((f for f in gather(failure, group) if f is not None), None)
    if first is None:
        return result[0]
    kind = Superseded if first.superseded else CheckpointError
    message = first.text if first.superseded else f"rank {first.rank} could not {what}: {first.text}"
    raise kind(message) from cause


def _told(error: Exception) -> str:
    """The error in words, with what to do about it where that is known."""
    text = str(error) or repr(error)
    fix = _FIXES.get(error.errno or 0) if isinstance(error, OSError) else None
    return f"{text}; {fix}" if fix else text
