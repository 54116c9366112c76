"""What a file of lines that may wait in memory for room does at the end of its block."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

log = logging.getLogger(__name__)


class WaitingLines(ABC):
    """A context that closes; what then finds no room is an error, but for a run that another one has ended."""

    @abstractmethod
    def close(self) -> None:
        """Write what waits. Raises OSError where it cannot be written."""

    @property
    @abstractmethod
    def num_waiting(self) -> int:
        """Lines that are not in the file yet."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except OSError as failure:
            if error is None:
                raise
            # `error` is what ended the run
            log.error("%d lines were not written: %s", self.num_waiting, failure)
