"""Ranges over HTTP: what passes is tried again, what stays is one error, and no bytes are ever others'."""

from __future__ import annotations

import base64
import logging
import os
import pickle
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from servers import Shelf, shelf
from vmamba_dist.config.schema import ConfigError
from vmamba_dist.data import remote
from vmamba_dist.data.remote import ChangedError, Fetcher, Item, Patience, RemoteSource, Web
from vmamba_dist.data.sources import SourceError

CONTENT = bytes(os.urandom(200_000))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shelf]:
    """Serves a.tar; waits between attempts are a tenth as long."""
    monkeypatch.setattr(remote, "_FIRST_WAIT_S", 0.025)
    monkeypatch.setattr(remote, "_LONGEST_WAIT_S", 0.2)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "a.tar").write_bytes(CONTENT)
    with shelf(tmp_path) as made:
        yield made


@pytest.fixture
def fetcher(server: Shelf) -> Iterator[Fetcher]:
    made = Fetcher(Web(), Patience(timeout_s=0.4, attempts=4))
    yield made
    made.close()


def item(server: Shelf) -> Item:
    return Item(f"{server.url}/a.tar", len(CONTENT))


@pytest.mark.parametrize(
    "fault",
    [
        "stall",
        "cut",
        "hang",
        "trickle",
        "range",
        "whole",
        "length",
        "408",
        "425",
        "429",
        "500",
        "502",
        "503",
        "504",
    ],
)
def test_what_passes_is_tried_again_and_gives_the_same_bytes(
    server: Shelf, fetcher: Fetcher, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.faults.extend([fault, fault])
    assert fetcher.read(item(server), 1000, 90_000) == CONTENT[1000:90_000]
    assert len(server.asked) == 3
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == 2
    assert all(f"{server.url}/a.tar: bytes 1000 … 90000 could not be read (" in text for text in told)


def test_it_is_reopened_at_the_offset_that_was_reached(server: Shelf, fetcher: Fetcher) -> None:
    server.faults.extend(["cut", "cut"])
    assert fetcher.read(item(server), 0, 80_000) == CONTENT[:80_000]
    assert server.ranges() == ["bytes=0-79999", "bytes=40000-79999", "bytes=60000-79999"]


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("stall", "Read timed out"),
        ("hang", "timed out"),
        ("trickle", r"were still to come after 0\.4 s"),
        ("500", "HTTP 500"),
        ("whole", "must support Range requests"),
        ("range", r"bytes 517 … 1512 came where 5 … 1000 were asked for"),
        ("length", "Content-Length 988 where 995 bytes were asked for"),
    ],
)
def test_what_stays_is_one_error_with_address_attempts_and_cause(
    server: Shelf, fetcher: Fetcher, fault: str, cause: str
) -> None:
    server.always = fault
    begun = time.monotonic()
    with pytest.raises(
        SourceError, match=rf"a\.tar: bytes 5 … 1000 could not be read in 4 attempts .*{cause}"
    ):
        fetcher.read(item(server), 5, 1000)
    assert time.monotonic() - begun < 10
    assert len(server.asked) == 4


def test_a_server_that_is_gone_is_one_error(tmp_path: Path, server: Shelf, fetcher: Fetcher) -> None:
    with shelf(tmp_path) as gone:
        address = f"{gone.url}/a.tar"
    with pytest.raises(SourceError, match=r"could not be read in 4 attempts .* refused") as caught:
        fetcher.read(Item(address), 0, 10)
    assert isinstance(
        pickle.loads(pickle.dumps(caught.value)), SourceError
    )  # workers send it to their parent


@pytest.mark.parametrize("status", ["400", "403", "404", "410"])
def test_a_final_answer_is_not_asked_for_again(server: Shelf, fetcher: Fetcher, status: str) -> None:
    server.always = status
    with pytest.raises(SourceError, match=rf"attempt 1 was the last: HTTP {status}"):
        fetcher.read(item(server), 0, 10)
    assert len(server.asked) == 1


def test_retry_after_is_kept(server: Shelf, fetcher: Fetcher) -> None:
    server.faults.append("503")
    server.retry_after = "1"
    begun = time.monotonic()
    assert fetcher.read(item(server), 0, 10) == CONTENT[:10]
    assert time.monotonic() - begun >= 1


def test_a_source_that_fails_too_often_is_given_up(server: Shelf) -> None:
    """Each read works at its second attempt: a failure each, a tenth of one earned back."""
    fetcher = Fetcher(Web(), Patience(timeout_s=1, attempts=4, max_failures=5))
    for i in range(5):
        server.faults.extend(["500"])
        assert fetcher.read(item(server), i, i + 10) == CONTENT[i : i + 10]
    server.faults.extend(["500"])
    with pytest.raises(SourceError, match=r"in 1 attempts .*data\.max_failures=5 times in this reader"):
        fetcher.read(item(server), 0, 10)
    fetcher.close()
    patient = Fetcher(Web(), Patience(timeout_s=1, attempts=4, max_failures=5))
    for i in range(120):  # one in twelve fails: for ever
        server.faults.extend(["500"] if i % 12 == 0 else [])
        assert patient.read(item(server), i, i + 10) == CONTENT[i : i + 10]
    patient.close()


def test_waits_grow_and_are_jittered() -> None:
    fetcher = Fetcher(Web())
    waits = [[fetcher._wait_s(attempt, 0) for _ in range(50)] for attempt in (1, 2, 3)]
    for few, more in pairwise(waits):
        assert max(few) <= 2 * min(few)
        assert sum(more) > 1.5 * sum(few)
        assert len(set(few)) > 40


def test_an_object_that_changes_is_an_error(server: Shelf, fetcher: Fetcher) -> None:
    """By its tag, where the size is the same; by its size; and against what the index says."""
    unknown = Item(f"{server.url}/a.tar")
    assert fetcher.read(unknown, 0, 10) == CONTENT[:10]
    server.tag = '"another"'
    with pytest.raises(ChangedError, match=r'a\.tar has changed: its tag is "another"'):
        fetcher.read(unknown, 0, 10)
    server.tag = ""
    (server.root / "a.tar").write_bytes(CONTENT[:-1])
    with pytest.raises(ChangedError, match="its size is 199999, and 200000"):
        fetcher.read(unknown, 0, 10)
    other = Fetcher(Web(), Patience(timeout_s=1))
    with pytest.raises(ChangedError, match="its size is 199999, and 200000"):
        other.read(item(server), 0, 10)
    with pytest.raises(ChangedError, match=r'its tag is .*, and "old" in the index'):
        other.read(Item(f"{server.url}/a.tar", 199_999, '"old"'), 0, 10)
    other.close()


def test_connections_are_kept(server: Shelf, fetcher: Fetcher) -> None:
    for i in range(20):
        fetcher.read(item(server), i, i + 100)
    assert server.open_sockets == 1


def test_a_signed_redirect_is_followed_and_never_told(
    server: Shelf, fetcher: Fetcher, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "vmamba_dist")
    server.faults.extend(
        [f"to {server.url}/a.tar?X-Amz-Signature=hush", "", *["to /a.tar?sig=hush", "500"] * 4]
    )
    assert fetcher.read(item(server), 0, 10) == CONTENT[:10]
    with pytest.raises(SourceError) as caught:
        fetcher.read(item(server), 0, 10)
    error: BaseException | None = caught.value
    while error is not None:
        assert "hush" not in str(error) + repr(error)
        error = error.__cause__
    assert "hush" in str(server.asked)
    server.always = "to http://host:99999/a.tar?sig=hush"  # which urllib3 tells in full
    with pytest.raises(SourceError, match=r"Failed to parse: .*http://host:99999/a\.tar\?…"):
        fetcher.read(item(server), 0, 10)
    assert "hush" not in caplog.text


def test_a_password_comes_from_netrc_and_is_never_told(
    server: Shelf, fetcher: Fetcher, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.needs = "Basic bWU6aHVzaA=="  # me:hush
    with pytest.raises(SourceError, match=r"HTTP 401 .*credentials come from .*~/\.netrc"):
        fetcher.read(item(server), 0, 10)
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password hush\n")
    (tmp_path / "netrc").chmod(0o600)
    assert fetcher.read(item(server), 0, 10) == CONTENT[:10]
    server.always = "500"
    with pytest.raises(SourceError) as caught:
        fetcher.read(item(server), 0, 10)
    assert "hush" not in caplog.text + str(caught.value)
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me pass hush\n")
    with pytest.raises(ConfigError, match=r"netrc, line 1: not in netrc's form") as bad:
        fetcher.read(item(server), 0, 10)
    assert "hush" not in str(bad.value)


def test_a_proxy_is_given_its_user_and_password_and_they_are_never_told(
    server: Shelf, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once the proxy was asked without them. An https:// address gives them to the tunnel alone."""
    for name in ("no_proxy", "NO_PROXY", "REQUEST_METHOD"):
        monkeypatch.delenv(name, raising=False)
    server.needs_proxy = "Basic " + base64.b64encode("me:hush@ü".encode()).decode()
    place = server.url.removeprefix("http://")
    far = Item("http://far.example/a.tar", len(CONTENT))
    monkeypatch.setenv("http_proxy", f"http://{place}")
    with pytest.raises(SourceError, match=r"HTTP 407.*user and password stand in HTTPS_PROXY or HTTP_PROXY"):
        fetcher.read(far, 0, 10)
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", f"http://me:hush%40%C3%BC@{place}")
    assert fetcher.read(far, 0, 10) == CONTENT[:10]
    assert server.asked[-1][0] == "http://far.example/a.tar"
    with pytest.raises(SourceError, match="502") as caught:
        fetcher.read(Item("https://far.example/a.tar"), 0, 10)
    assert server.tunnels == [("far.example:443", server.needs_proxy)] * 4
    assert "hush" not in caplog.text + str(caught.value) + repr(caught.value.__cause__)
    monkeypatch.setenv("http_proxy", f"me:hush%40%C3%BC@{place}")  # as curl takes it
    assert fetcher.read(far, 0, 10) == CONTENT[:10]


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_fork_makes_connections_of_its_own(server: Shelf) -> None:
    source = RemoteSource([item(server)], Web(), Patience(timeout_s=5))
    assert source.read(0, 0, 50_000) == CONTENT[:50_000]
    child = os.fork()
    if not child:
        same = source.read(0, 7, 50_000) == CONTENT[7:50_000]
        source.close()
        os._exit(0 if same else 1)
    ours = [source.read(0, i, 50_000 + i) == CONTENT[i : 50_000 + i] for i in range(20)]
    assert os.waitpid(child, 0)[1] == 0
    assert all(ours)
    assert len(set(server.ranges())) >= 21
    source.close()


def test_many_threads_read_at_once_and_close_ends_what_waits(server: Shelf) -> None:
    before = set(threading.enumerate())
    source = RemoteSource([item(server)], Web(), Patience(timeout_s=5, attempts=50))
    server.faults.extend(["500"] * 8)
    threads = [
        threading.Thread(target=lambda i=i: good.append(source.read(0, i, i + 999) == CONTENT[i : i + 999]))
        for i in range(32)
    ]
    good: list[bool] = []
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert good == [True] * 32
    server.always, server.retry_after = "503", "60"
    stopped: list[str] = []

    def read() -> None:
        try:
            source.read(0, 0, 10)
        except SourceError as error:
            stopped.append(str(error))

    waiting = threading.Thread(target=read)
    waiting.start()
    while not any(fault == "503" for *_, fault in server.asked):
        time.sleep(0.01)
    time.sleep(0.1)
    source.close()
    waiting.join(5)
    assert not waiting.is_alive()
    assert "reading was stopped after: HTTP 503" in stopped[0]
    deadline = time.monotonic() + 5
    while (server.open_sockets or set(threading.enumerate()) - before) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server.open_sockets == 0
    assert set(threading.enumerate()) <= before
