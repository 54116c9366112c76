"""One request for a range of an object, over HTTP.

Law: an attempt ends, by success or by failure, within about its time limit, and hands over what it has read by
then; whether it is worth another is in the failure's type. An answer is believed only where status, Content-Range
and length are those of the range that was asked for.

urllib3: connections are kept and reused over threads, every socket call has a limit, and redirects drop the
authorization where they leave a host. A process forked from this one makes connections of its own.
"""

from __future__ import annotations

import netrc
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import getproxies, proxy_bypass

import urllib3
from urllib3.exceptions import HTTPError, MaxRetryError
from urllib3.util import Retry, Timeout, make_headers

from vmamba_dist.config.addresses import redact
from vmamba_dist.config.schema import ConfigError, UserError

if TYPE_CHECKING:
    from urllib3.response import BaseHTTPResponse

_CHUNK = 1 << 16  # bytes: between two looks at the clock
_CONNECT_S = 10.0
_HOSTS = 8  # whose connections are kept
_REDIRECTS = Retry(
    total=None,
    connect=0,
    read=0,
    redirect=5,
    status=0,
    other=0,
    raise_on_status=False,
    respect_retry_after_header=False,
)
_AGAIN = {408, 425, 429, 500, 502, 503, 504}  # all others below 600 say the same when asked again
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_ALL = re.compile(r"bytes \*/(\d+)")


class AttemptError(Exception):
    """One request failed; another may not. `after_s` is how long the server asks to wait."""

    def __init__(self, message: str, after_s: float = 0.0) -> None:
        super().__init__(message)
        self.after_s = after_s


class RefusedError(Exception):
    """The server's answer is final: another request would get the same."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Facts:
    """What an answer says of the whole object; size is None where it does not."""

    size: int | None
    tag: str  # ETag, else Last-Modified, else ""


class Http:
    """Requests with kept connections; for use from several threads."""

    def __init__(self, timeout_s: float, connections: int) -> None:
        self._timeout_s = timeout_s
        self._connections = connections
        self._pools: dict[str, urllib3.PoolManager] = {}  # by proxy, "" is none
        self._pid = os.getpid()
        self._lock = threading.Lock()

    def get(
        self,
        url: str,
        headers: Mapping[str, str],
        start: int,
        end: int,
        into: bytearray,
        check: Callable[[Facts], None],
    ) -> None:
        """Append bytes [start, end) of the object at `url` to `into`; `check` is called before the first of them.

        Raises AttemptError, with what came before it in `into`, or RefusedError; and what `check` raises.
        """
        begun = time.monotonic()
        asked = {**headers, "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        try:
            answer = self._pool(url).request(
                "GET",
                url,
                headers=asked,
                redirect=True,
                retries=_REDIRECTS,
                preload_content=False,
                decode_content=False,
                timeout=Timeout(connect=min(_CONNECT_S, self._timeout_s), read=self._timeout_s),
            )
        except (HTTPError, OSError) as error:
            raise AttemptError(_told(error)) from None  # its own text holds the whole address
        whole = False
        try:
            count = _expect(answer, start, end, check)
            while count:
                part = answer.read1(min(count, _CHUNK))
                if not part:
                    raise AttemptError(f"the connection ended {count} bytes too early")
                into += part
                count -= len(part)
                if count and time.monotonic() - begun > self._timeout_s:
                    raise AttemptError(f"{count} bytes were still to come after {self._timeout_s:g} s")
            whole = True
        except UserError:  # of `check`; an OSError too
            raise
        except (HTTPError, OSError) as error:
            raise AttemptError(_told(error)) from None
        finally:
            # Python before 3.11.8 and 3.12.2 leaves a response open that read1 has read to its end, and with it the
            # socket, even once the connection is closed.
            if whole and (original := getattr(answer, "_original_response", None)) is not None:
                original.close()
            if not whole:
                answer.close()
            answer.release_conn()  # a closed one too: the pool counts them, and opens it again

    def close(self) -> None:
        """Close what this process has open."""
        if self._pid == os.getpid():
            for pool in self._pools.values():
                for host in pool.pools.keys():  # noqa: SIM118  not a dict
                    pool.pools[host].close()  # clear() alone leaves it to the garbage collector
                pool.clear()
        self._pools = {}

    def _pool(self, url: str) -> urllib3.PoolManager:
        with self._lock:
            return self._pool_of(url)

    def _pool_of(self, url: str) -> urllib3.PoolManager:
        if self._pid != os.getpid():  # a fork: the connections are its parent's
            self._pools, self._pid = {}, os.getpid()
        parts = urlsplit(url)
        proxy = "" if proxy_bypass(parts.hostname or "") else getproxies().get(parts.scheme, "")
        if proxy not in self._pools:
            bundle = os.environ.get("AWS_CA_BUNDLE") or os.environ.get("REQUESTS_CA_BUNDLE")
            common = {"maxsize": self._connections, "block": True, "ca_certs": bundle}
            self._pools[proxy] = (
                urllib3.ProxyManager(*_proxy(proxy), **common)  # type: ignore[arg-type]
                if proxy
                else urllib3.PoolManager(_HOSTS, **common)  # type: ignore[arg-type]
            )
        return self._pools[proxy]


def _proxy(address: str) -> tuple[str, int, None, dict[str, str]]:
    """Return ProxyManager's arguments: an address without user and password, and these as headers for it alone."""
    scheme, _, rest = address.rpartition("://")
    user, at, host = rest.rpartition("@")
    # The bytes that are meant, whatever they encode: the header is made of latin-1.
    known = unquote_to_bytes(user).decode("latin-1")
    headers = dict(make_headers(proxy_basic_auth=known)) if at else {}
    return f"{scheme or 'http'}://{host}", _HOSTS, None, headers


def basic_auth(url: str) -> dict[str, str]:
    """Return what ~/.netrc (or NETRC) has for the host, as a header; only where the way there is encrypted or local.

    Raises ConfigError for a file that cannot be read as one, without its content.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    if not path.is_file() or not (parts.scheme == "https" or host in ("localhost", "127.0.0.1", "::1")):
        return {}
    try:
        found = netrc.netrc(path).hosts.get(host)
    except (netrc.NetrcParseError, UnicodeDecodeError) as error:
        line = f", line {error.lineno}" if isinstance(error, netrc.NetrcParseError) else ""
        raise ConfigError(
            f"{path.name}{line}: not in netrc's form; mend it, or name another in NETRC"
        ) from None
    return dict(make_headers(basic_auth=f"{found[0]}:{found[2]}")) if found else {}


def _expect(answer: BaseHTTPResponse, start: int, end: int, check: Callable[[Facts], None]) -> int:
    """Check an answer's head; returns how many bytes follow."""
    headers, status = answer.headers, answer.status
    tag = headers.get("ETag") or headers.get("Last-Modified") or ""
    if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        found = _ALL.match(headers.get("Content-Range", ""))
        check(Facts(int(found[1]) if found else None, tag))
        raise RefusedError(f"HTTP 416: the object has no bytes {start} … {end}", status)
    if status == HTTPStatus.OK:
        length = headers.get("Content-Length", "")
        if start == 0 and length.isdigit() and int(length) <= end:  # the whole object was asked for
            check(Facts(int(length), tag))
            return int(length)
        raise AttemptError(
            "HTTP 200 with the whole object where a range was asked for: the server must support Range requests"
        )
    if status != HTTPStatus.PARTIAL_CONTENT:
        reason = f"HTTP {status} {answer.reason or ''}".strip()
        if status in _AGAIN:
            raise AttemptError(reason, _retry_after(headers.get("Retry-After", "")))
        raise RefusedError(reason, status)
    found = _RANGE.fullmatch(headers.get("Content-Range", "").strip())
    if not found:
        raise AttemptError(f"Content-Range {headers.get('Content-Range', '')[:40]!r} is no range of bytes")
    first, last, total = int(found[1]), int(found[2]), None if found[3] == "*" else int(found[3])
    check(Facts(total, tag))
    wanted = end - 1 if total is None else min(end, total) - 1
    if (first, last) != (start, wanted):
        raise AttemptError(f"bytes {first} … {last + 1} came where {start} … {wanted + 1} were asked for")
    told = headers.get("Content-Length")
    if told is not None and told != str(last + 1 - first):
        raise AttemptError(f"Content-Length {told[:20]} where {last + 1 - first} bytes were asked for")
    return last + 1 - first


def _retry_after(value: str) -> float:
    """Read Retry-After: seconds, or a date."""
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0


def _told(error: BaseException) -> str:
    """Say what went wrong, without addresses and without the objects that urllib3 names."""
    if isinstance(error, MaxRetryError) and error.reason is not None:
        error = error.reason
    text = re.sub(r"^<?[\w.]*Connection(Pool)?\([^)]*\)>?: ", "", redact(str(error)))
    text = re.sub(r"<[\w.]+ object at 0x[0-9a-f]+>:? ?", "", text)
    return f"{type(error).__name__}: {text}"
