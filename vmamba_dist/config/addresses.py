"""Addresses in a config, and in what is said of them.

Law: no credential comes from a config, and none gets into a log, a run directory or an error. An address with a
user, a password or a signature in it is refused, and every message about an address goes through `redact`.
"""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, urlsplit

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^\s'\"<>]*)")
# Words in the names of query parameters that sign an address, or stand for who asks: S3, GCS, CloudFront, Azure, hubs.
_SIGNS = re.compile(
    r"(^sig$|signature|credential|token|secret|passw|accesskey|access_key|api_?key|key-pair-id|^policy$|^auth)",
    re.IGNORECASE,
)
# Keys that somebody may try to give; what they hold must not be told back.
_SECRET_KEY = re.compile(
    r"(secret|password|passwd|token|credential|access_?key|api_?key|signature)", re.IGNORECASE
)

WHERE = (
    "credentials come from the usual places alone: AWS_* variables, a profile or the machine's role for s3://, "
    "~/.netrc for https://"
)


def fault_of(address: str) -> str:
    """Say why an address may not stand in a config; "" where it may. The answer holds nothing secret."""
    if "://" not in address:
        return ""
    try:
        parts = urlsplit(address)
        has_user = "@" in parts.netloc
    except ValueError as error:
        return f"no address: {error}"
    if has_user:
        return f"a user or a password in an address is refused; {WHERE}"
    signed = [name for name, _ in parse_qsl(parts.query, keep_blank_values=True) if _SIGNS.search(name)]
    if signed:
        return f"a signed address ({signed[0]}=…) is refused; {WHERE}"
    return ""


def is_secret(key: str) -> bool:
    """Tell whether a key of a config asks for a credential by its name."""
    return _SECRET_KEY.search(key.rsplit(".", 1)[-1]) is not None


def redact(text: str) -> str:
    """Take users, passwords and queries out of every address in a text."""
    return _URL.sub(_redacted, text)


def _redacted(match: re.Match[str]) -> str:
    rest = match[2]
    host, slash, path = rest.partition("/")
    if "@" in host:
        host = "…@" + host.rpartition("@")[2]
    rest = host + slash + path
    before, mark, _ = rest.partition("?")
    return f"{match[1]}://{before}{'?…' if mark else ''}"
