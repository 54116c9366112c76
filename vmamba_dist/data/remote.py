"""Ranges of objects in a store, read in spite of what fails on the way.

Law: a read returns exactly the bytes that were asked for, or raises. What may pass is tried again, from the
offset that was reached, after a wait that grows and is jittered; what stays, or fails too often, is one
SourceError with the address, the attempts and the last cause. Nothing here is ever a fault of a sample, so no
rank takes another order than the rest because its network failed. An object that is no longer the one the index
was made of (another size or tag) is an error at once.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Protocol

from vmamba_dist.config.addresses import redact
from vmamba_dist.data.http import AttemptError, Facts, Http, RefusedError, basic_auth
from vmamba_dist.data.sources import SourceError

log = logging.getLogger(__name__)

CONCURRENCY = 16  # requests of one reader at a time: 16 of 50 ms each are 320 blocks a second
_FIRST_WAIT_S, _LONGEST_WAIT_S, _LONGEST_ASKED_S = 0.25, 16.0, 60.0
_EARNED = 0.1  # of a failure, by each request that works
_AT_ONCE = 8 << 20  # bytes of one request, so that its time limit is one of progress


class ChangedError(SourceError):
    """An object is not the one that the index was made of."""


@dataclass(frozen=True)
class Item:
    """An object in a store; size None and tag "" are not known yet."""

    address: str  # as it is told
    size: int | None = None
    tag: str = ""


class Store(Protocol):
    """Where an address leads, and who asks."""

    def request(self, address: str) -> tuple[str, Mapping[str, str]]:
        """Return the URL of a GET for the object at `address`, and headers that allow it, made for this request.

        Raises AttemptError where another try may find them.
        """


class Web:
    """http:// and https:// addresses, with ~/.netrc."""

    def request(self, address: str) -> tuple[str, Mapping[str, str]]:
        return address, basic_auth(address)


@dataclass(frozen=True)
class Patience:
    """How much a reader bears of a source."""

    timeout_s: float = 30.0  # of one request
    attempts: int = 8  # for one range
    max_failures: int = 64  # of a source in this process; each request that works earns a tenth of one back


class Fetcher:
    """Reads ranges of one source's objects. For use from several threads, and from a fork that is its only user."""

    concurrency = CONCURRENCY

    def __init__(self, store: Store, patience: Patience = Patience()) -> None:
        self._store = store
        self._patience = patience
        self._http = Http(patience.timeout_s, CONCURRENCY)
        self._jitter = random.Random(int.from_bytes(os.urandom(8)))  # never the training's randomness
        self._seen: dict[str, Facts] = {}  # of items whose size or tag was not known
        self._failures = 0.0
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def read(self, item: Item, start: int, end: int) -> bytes:
        """Read bytes [start, end). Raises ChangedError, or SourceError once nothing is left to try."""
        parts = [self._read(item, at, min(end, at + _AT_ONCE)) for at in range(start, end, _AT_ONCE)]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def look(self, address: str) -> Item | None:
        """Ask for an object's size and tag; None where there is no such object. Raises SourceError."""
        item = Item(address)
        try:
            self._read(item, 0, 1)
        except SourceError as error:
            cause = error.__cause__
            status = cause.status if isinstance(cause, RefusedError) else 0
            if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and self._seen[address].size == 0:
                return Item(address, 0, self._seen[address].tag)
            if status in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE):
                return None
            raise
        facts = self._seen[address]
        return Item(address, facts.size, facts.tag)

    def close(self) -> None:
        """End what waits for another attempt, and close the connections; a later read makes new ones."""
        self._closed.set()
        self._http.close()
        self._closed = threading.Event()

    def _read(self, item: Item, start: int, end: int) -> bytes:
        got = bytearray()
        attempts, begun = 0, time.monotonic()
        while True:
            attempts += 1
            try:
                url, headers = self._store.request(item.address)
                self._http.get(
                    url, headers, start + len(got), end, got, lambda facts: self._check(item, facts)
                )
            except RefusedError as error:
                raise SourceError(
                    f"{redact(item.address)}: bytes {start} … {end} cannot be read, attempt {attempts} was the "
                    f"last: {error}{_hint(error.status)}"
                ) from error
            except AttemptError as error:
                left = self._fail()
                if attempts >= self._patience.attempts or left <= 0:
                    budget = (
                        ""
                        if left > 0
                        else (
                            f"; the source has failed more than data.max_failures={self._patience.max_failures} times "
                            "in this reader, too often to go on"
                        )
                    )
                    raise SourceError(
                        f"{redact(item.address)}: bytes {start} … {end} could not be read in {attempts} attempts "
                        f"over {time.monotonic() - begun:.1f} s; the last one failed with: {error}{budget}"
                    ) from error
                wait_s = self._wait_s(attempts, error.after_s)
                log.warning(
                    "%s: bytes %d … %d could not be read (%s); trying again from %d in %.1f s",
                    *(redact(item.address), start, end, error, start + len(got), wait_s),
                )
                if self._closed.wait(wait_s):
                    raise SourceError(
                        f"{redact(item.address)}: reading was stopped after: {error}"
                    ) from error
            else:
                with self._lock:
                    self._failures = max(0.0, self._failures - _EARNED)
                return bytes(got)

    def _check(self, item: Item, facts: Facts) -> None:
        with self._lock:
            seen = self._seen.get(item.address)
            if seen is None and (item.size is None or not item.tag):
                self._seen[item.address] = facts
        size = item.size if item.size is not None or seen is None else seen.size
        tag = item.tag or (seen.tag if seen is not None else "")
        for what, known, now in (("size", size, facts.size), ("tag", tag, facts.tag)):
            if known not in (None, "") and now not in (None, "") and known != now:
                raise ChangedError(
                    f"{redact(item.address)} has changed: its {what} is {now}, and {known} in the index or when it "
                    "was first read; a run's shards must stay as they are: put the old one back, or begin a new run"
                )

    def _fail(self) -> float:
        """Count a failure; returns how many more the source may have."""
        with self._lock:
            self._failures += 1
            return self._patience.max_failures - self._failures

    def _wait_s(self, attempts: int, asked_s: float) -> float:
        """Wait at least what the server asks for, else a doubling time; half of it is drawn, so that ranks part."""
        longest = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2.0 ** (attempts - 1))
        with self._lock:
            share = self._jitter.uniform(0.5, 1.0)
        return max(longest * share, min(asked_s, _LONGEST_ASKED_S) * (0.5 + share))


def _hint(status: int) -> str:
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return (
            "; credentials come from the environment, a profile or the machine's role for s3://, from ~/.netrc for "
            "https://"
        )
    if status == HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:
        return (
            "; a proxy's user and password stand in HTTPS_PROXY or HTTP_PROXY: http://user:password@host:port"
        )
    return ""


class RemoteSource:
    """Shards that are objects in a store."""

    concurrency = CONCURRENCY

    def __init__(self, items: Sequence[Item], store: Store, patience: Patience) -> None:
        self._items = items
        self._fetcher = Fetcher(store, patience)

    def read(self, shard: int, start: int, end: int) -> bytes:
        return self._fetcher.read(self._items[shard], start, end)

    def close(self) -> None:
        self._fetcher.close()
