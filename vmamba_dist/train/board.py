"""Curves for TensorBoard.

Law: what TensorBoard cannot write ends no run. The curves then have a gap, which metrics.jsonl has not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)


class Board:
    """A SummaryWriter that goes on, in a file of its own, at the first flush with room after a failure."""

    def __init__(self, folder: Path, *, after_step: int) -> None:
        """Steps after `after_step` that an earlier attempt wrote are hidden."""
        self._folder = folder
        self._writer: SummaryWriter | None = SummaryWriter(str(folder), purge_step=after_step + 1)

    def add_scalar(self, key: str, value: float, step: int) -> None:
        self._try(lambda writer: writer.add_scalar(key, value, step))

    def add_text(self, key: str, text: str, step: int) -> None:
        self._try(lambda writer: writer.add_text(key, text, step))

    def add_images(self, key: str, images: NDArray[Any], step: int) -> None:
        self._try(lambda writer: writer.add_images(key, images, step))

    def flush(self) -> None:
        """Put what was added into the file; after a failure, try another file."""
        if self._writer is None:
            try:
                self._writer = SummaryWriter(str(self._folder))
            except OSError:
                for path in self._folder.iterdir():
                    if not path.stat().st_size:  # begun in vain
                        path.unlink()
                return
            log.warning("%s is written again", self._folder)
        self._try(lambda writer: writer.flush())

    def close(self) -> None:
        self._try(lambda writer: writer.close())

    def _try(self, action: Callable[[SummaryWriter], None]) -> None:
        if self._writer is None:
            return
        try:
            action(self._writer)
        except OSError as error:
            log.warning(
                "%s cannot be written: %s; the curves have a gap, metrics.jsonl has every step",
                self._folder,
                error,
            )
            self._writer = None  # its thread has ended with the error
