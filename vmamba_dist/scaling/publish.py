"""A result appears whole or not at all.

Law: what has its final name was written and is on the disk; a kill leaves what was there before.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from vmamba_dist.config.schema import ConfigError
from vmamba_dist.core.rundir import sync_directory


def publish(path: Path, content: bytes | str) -> None:
    """Write a file beside its place, and move it there. Raises ConfigError where that cannot be written."""
    data = content.encode() if isinstance(content, str) else content
    beside = path.with_name(f".{path.name}.tmp")  # one name: what a kill left there, the next one writes over
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise ConfigError(f"{path} cannot be written: {error}") from error
    sync_directory(path.parent)


def publish_json(path: Path, content: Any) -> None:
    """The same for plain values; a number that is not finite is an error of ours."""
    publish(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
