"""A collective that hangs ends with the names of those who did not come.

Law: a rank's thread writes where the rank is to a file of its own in the run directory, which all machines share
and which needs no other rank to answer. Who has stood still for most of parallel.timeout_s, and sees another
rank behind its own mark or without a sign of life, says so and ends its process; the launcher ends the others.
This comes before the collectives' own time limit, whose message names nobody.

Nobody is behind a rank that computes, reads or writes for long while the others do the same, so such phases need
no limits. While checkpoints are written or loaded a process is never ended from here: writes of heartbeats may
then be as slow as all others, and the collectives' own limit still holds.

What is told is where the hosts are. On GPUs a host queues work and runs ahead to "report", also where its own
device hangs: all then stand there, nobody is behind, and NCCL's limit ends the run without a name.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from vmamba_dist.core.dist import World, is_of_a_collective
from vmamba_dist.train.progress import Place, Progress

log = logging.getLogger(__name__)

EXIT_CODE = 74  # EX_IOERR: of a process that the watch ended
PATIENT = {"loading", "saving"}  # phases in which the watch ends nothing
# Shares of parallel.timeout_s.
BEAT = 1 / 16  # between two heartbeats
LOOK = 8 / 16  # standing still for so long, a rank begins to look at the others
LIMIT = 12 / 16  # and for so long, it ends
SILENT = 3  # beats that a living rank would have made
MIN_BEAT_S = 0.05
CLOSE_S = 5.0  # for the thread to end; one that waits for storage is left behind
BYTES = 512  # of a heartbeat: one write replaces all of it


class MissingRanksError(RuntimeError):
    """A collective failed or timed out because some ranks did not arrive: the message names them."""


@dataclass(frozen=True)
class Beat:
    """A rank's heartbeat, as it stands in its file."""

    attempt: int
    rank: int
    host: str
    pid: int
    number: int  # of the beats of this attempt
    at: float  # seconds since 1970, of the writer's clock
    count: int  # marks made: see Progress
    step: int
    phase: str
    stood: float  # seconds since that mark

    def where(self) -> str:
        return f"step {self.step}, {self.phase}"


@dataclass
class _Seen:
    beat: Beat | None
    since: float  # monotonic: when this beat was first seen


class Watch:
    """This rank's heartbeat, and its eye on the others' while it stands still."""

    def __init__(
        self,
        folder: Path,
        attempt: int,
        world: World,
        progress: Progress,
        timeout_s: float,
        *,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        self._folder = folder
        self._attempt = attempt
        self._world = world
        self._progress = progress
        self._timeout_s = timeout_s
        self._end = end
        self._host = socket.gethostname()
        self._pause_s = max(MIN_BEAT_S, BEAT * timeout_s)
        self._number = 0
        self._seen: dict[int, _Seen] = {}
        self._warned = -1  # the mark of the last warning
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch while inside. An error of a collective that timed out is told by the ranks that are missing."""
        self._folder.mkdir(exist_ok=True)
        if self._world.is_main:
            self._clear()
        self._thread.start()
        try:
            yield
        except Exception as error:
            self._close()
            missing = self._missing() if is_of_a_collective(error) else None
            if missing is None:
                raise
            raise MissingRanksError(self._tell_once(missing)) from error
        finally:
            self._close()
            self._path(self._world.rank).unlink(missing_ok=True)

    def _close(self) -> None:
        self._closing.set()
        self._thread.join(timeout=CLOSE_S)

    def _clear(self) -> None:
        """Remove what killed attempts left, but for what the ranks of this one write anew."""
        ours = {self._path(rank) for rank in range(self._world.size)}
        for path in set(self._folder.iterdir()) - ours:
            path.unlink()

    def _run(self) -> None:
        failing = False
        while not self._closing.wait(self._pause_s):
            try:
                self._turn()
                failing = False
            except OSError as error:
                self._seen.clear()  # who cannot beat judges nobody: the others' beats may fail likewise
                if not failing:
                    log.error(
                        "rank %d: the heartbeat in %s failed, so nobody sees whether it lives until one succeeds: %s",
                        self._world.rank,
                        self._folder,
                        error,
                    )
                failing = True

    def _turn(self) -> None:
        place = self._progress.place
        self._write(place)
        stood = time.monotonic() - place.since
        if stood < LOOK * self._timeout_s:
            self._seen.clear()
            return
        self._look()
        if stood < LIMIT * self._timeout_s or place.phase in PATIENT:
            return
        missing = self._missing()
        if missing is None:
            if self._world.is_main and self._warned != place.count:
                self._warned = place.count
                log.warning(
                    "step %d: all ranks are in %s, for %.3g s now; a collective may take parallel.timeout_s=%g",
                    *(place.step, place.phase, stood, self._timeout_s),
                )
        elif self._progress.place == place:
            self._tell_once(missing)
            sys.stdout.flush()
            sys.stderr.flush()
            self._end(EXIT_CODE)

    def _write(self, place: Place) -> None:
        self._number += 1
        beat = Beat(
            *(self._attempt, self._world.rank, self._host, os.getpid(), self._number, time.time()),
            *(place.count, place.step, place.phase, time.monotonic() - place.since),
        )
        line = json.dumps(asdict(beat)).encode().ljust(BYTES - 1) + b"\n"
        # Opened each time: another machine's NFS sees what was written when it is closed.
        descriptor = os.open(self._path(self._world.rank), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.pwrite(descriptor, line, 0)
        finally:
            os.close(descriptor)

    def _look(self) -> None:
        now = time.monotonic()
        for rank in range(self._world.size):
            if rank == self._world.rank:
                continue
            beat = self._read(rank)
            seen = self._seen.get(rank)
            if seen is None or (beat is not None and beat != seen.beat):
                self._seen[rank] = _Seen(beat, now)

    def _read(self, rank: int) -> Beat | None:
        try:
            beat = Beat(**json.loads(self._path(rank).read_bytes()))
        except (FileNotFoundError, ValueError, TypeError):
            return None
        return beat if beat.attempt == self._attempt else None

    def _missing(self) -> str | None:
        """Who is behind this rank or silent, in words; None where all are here, or it is too early to know."""
        place = self._progress.place
        now = time.monotonic()
        stood = now - place.since
        if stood < LIMIT * self._timeout_s:
            return None
        told = {
            rank: self._tell(rank, seen, now)
            for rank, seen in sorted(self._seen.items())
            if now - seen.since > SILENT * self._pause_s
            or (seen.beat is not None and seen.beat.count < place.count)
        }
        if not told:
            return None
        ranks = f"rank{'s' * (len(told) > 1)} {', '.join(map(str, told))}"
        return (
            f"step {place.step}: {ranks} did not arrive within {stood:.3g} s (parallel.timeout_s={self._timeout_s:g}), "
            f"and the others wait in {place.phase}. {'; '.join(list(told.values())[:8])}"
        )

    def _tell(self, rank: int, seen: _Seen, now: float) -> str:
        beat = seen.beat
        if beat is None:
            return f"Rank {rank} has given no sign of life in this attempt"
        who = f"Rank {rank} (host {beat.host}, pid {beat.pid})"
        if now - seen.since > SILENT * self._pause_s:
            return f"{who} was last seen at {beat.where()}, {time.time() - beat.at:.3g} s ago, and is silent since"
        return f"{who} lives, at {beat.where()}, for {beat.stood:.3g} s"

    def _tell_once(self, missing: str) -> str:
        """Log this unless another rank has told its own view already; return what was told."""
        verdict = self._folder / f"verdict-{self._attempt}"
        try:
            with verdict.open("x", encoding="utf-8") as file:
                file.write(missing)
        except FileExistsError:
            return verdict.read_text(encoding="utf-8") or missing
        except OSError as error:  # no room: told twice is better than not at all
            log.error("%s cannot be written: %s", verdict, error)
        log.error("%s", missing)
        return missing

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank-{rank:05d}.json"
