"""Servers on loopback that hold shards: an honest S3, and a web server that fails as it is told."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3

KEY_ID, SECRET = "AKIAnobody", "hush-hush-secret"
BUCKET = "shelf"


@dataclass
class Shelf:
    """A folder behind HTTP. Each request for a tar takes the next fault of `faults`, or `always` where none is left.

    Faults: a status ("404", "503"), stall (nothing comes), cut (half comes, then the end), hang (half comes, then
    nothing), trickle, range (another one), whole (200 for a range), length (another than the range's).
    """

    root: Path
    url: str = ""
    faults: deque[str] = field(default_factory=deque)
    always: str = ""
    retry_after: str = ""
    tag: str = ""  # instead of the file's own
    needs: str = ""  # an Authorization header, or 401
    needs_proxy: str = (
        ""  # a Proxy-Authorization header, or 407; any host's addresses are answered from the folder
    )
    tunnels: list[tuple[str, str]] = field(default_factory=list)  # host and Proxy-Authorization; refused
    wait_s: float = 0.0  # before each answer of a tar
    asked: list[tuple[str, str, str]] = field(default_factory=list)  # path, Range, fault
    sent: int = 0  # bytes of tars
    at_once: int = 0  # requests for tars that are being answered
    most_at_once: int = 0
    sockets: set[int] = field(default_factory=set)  # of connections that are open
    released: threading.Event = field(
        default_factory=threading.Event
    )  # set at the end: nothing stalls longer

    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def open_sockets(self) -> int:
        return len(self.sockets)

    def ranges(self) -> list[str]:
        return [asked for path, asked, _ in self.asked if path.endswith(".tar")]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for an acknowledgement
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.server.shelf.sockets.add(id(self))

    def finish(self) -> None:
        with suppress(OSError):
            super().finish()
        self.server.shelf.sockets.discard(id(self))

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        with suppress(ConnectionError, BrokenPipeError):
            self._answer()

    def do_CONNECT(self) -> None:
        self.server.shelf.tunnels.append((self.path, self.headers.get("Proxy-Authorization", "")))
        self._refuse(502)

    def _answer(self) -> None:
        shelf = self.server.shelf
        path, asked = urlsplit(self.path).path, self.headers.get("Range", "")
        is_tar = path.endswith(".tar")
        if is_tar and shelf.wait_s:
            with shelf.lock:
                shelf.at_once += 1
                shelf.most_at_once = max(shelf.at_once, shelf.most_at_once)
            shelf.released.wait(shelf.wait_s)
            with shelf.lock:
                shelf.at_once -= 1
        fault = (shelf.faults.popleft() if shelf.faults else shelf.always) if is_tar else ""
        shelf.asked.append((self.path, asked, fault))
        if shelf.needs and self.headers.get("Authorization") != shelf.needs:
            return self._refuse(401)
        if shelf.needs_proxy and self.headers.get("Proxy-Authorization") != shelf.needs_proxy:
            return self._refuse(407)
        if fault.startswith("to "):
            self.send_response(302)
            self.send_header("Location", fault[3:])
            self.send_header("Content-Length", "0")
            return self.end_headers()
        file = shelf.root / path.lstrip("/")
        if fault.isdigit() or not file.is_file():
            return self._refuse(int(fault or 404))
        if fault == "stall":
            shelf.released.wait()
            self.close_connection = True
            return None
        content = file.read_bytes()
        first, last = (int(n) for n in asked.removeprefix("bytes=").split("-"))
        if first >= len(content):
            return self._refuse(416, f"bytes */{len(content)}")
        part = content if fault == "whole" else content[first : last + 1]
        shift = 512 if fault == "range" else 0
        self.send_response(200 if fault == "whole" else 206)
        self.send_header("Content-Length", str(len(part) - (7 if fault == "length" else 0)))
        if fault != "whole":
            self.send_header(
                "Content-Range", f"bytes {first + shift}-{first + shift + len(part) - 1}/{len(content)}"
            )
        self.send_header("ETag", shelf.tag or f'"{file.stat().st_mtime_ns:x}-{len(content):x}"')
        self.end_headers()
        self._send(part, fault, is_tar)
        return None

    def _send(self, part: bytes, fault: str, is_tar: bool) -> None:
        shelf = self.server.shelf
        if fault in ("cut", "hang"):
            part = part[: len(part) // 2]
        if fault == "trickle":
            for at in range(len(part)):
                if shelf.released.wait(0.05):
                    break
                self.wfile.write(part[at : at + 1])
        else:
            self.wfile.write(part)
        shelf.sent += len(part) * is_tar
        if fault == "hang":
            shelf.released.wait()
        self.close_connection = fault in ("cut", "hang", "trickle", "length", "whole")

    def _refuse(self, status: int, content_range: str = "") -> None:
        self.send_response(status)
        if self.server.shelf.retry_after and status == 503:
            self.send_header("Retry-After", self.server.shelf.retry_after)
        if content_range:
            self.send_header("Content-Range", content_range)
        self.send_header("Content-Length", "0")
        self.end_headers()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64
    shelf: Shelf

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.broken: list[BaseException] = []

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is what is tested; any other error is the server's own, and the test's."""
        error = sys.exception()
        if error is not None and not isinstance(error, ConnectionError | TimeoutError):
            self.broken.append(error)


@contextmanager
def shelf(root: Path) -> Iterator[Shelf]:
    """Serve a folder while the context lasts."""
    made = Shelf(root)
    server = _Server(("127.0.0.1", 0), _Handler)
    server.shelf = made
    made.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        made.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
    if server.broken:
        raise server.broken[0]


@contextmanager
def s3() -> Iterator[str]:
    """Run moto's S3 in a process of its own, with an empty bucket; yields the endpoint's address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "AWS_ACCESS_KEY_ID": KEY_ID, "AWS_SECRET_ACCESS_KEY": SECRET},
    )
    try:
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"{url}/moto-api/", timeout=5):
                    break
            except OSError:
                assert process.poll() is None
                time.sleep(0.1)
        client(url).create_bucket(Bucket=BUCKET)
        yield url
    finally:
        process.kill()
        process.wait()


def client(url: str) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id=KEY_ID,
        aws_secret_access_key=SECRET,
    )


def upload(url: str, folder: Path, prefix: str) -> None:
    """Put a folder's files below s3://BUCKET/prefix."""
    bucket = client(url)
    for path in folder.iterdir():
        if path.is_file():
            bucket.put_object(Bucket=BUCKET, Key=f"{prefix}/{path.name}", Body=path.read_bytes())
