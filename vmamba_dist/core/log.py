"""What a run says: plain lines in train.log, Rich on a terminal.

Law: rank 0 speaks for the run; another rank speaks only of trouble of its own, with its number.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_console = Console(stderr=False)


@contextmanager
def logging_to(path: Path, rank: int) -> Iterator[None]:
    """Send the records of vmamba_dist and vmamba_kernels to `path` and to the terminal while inside."""
    form = logging.Formatter(
        f"%(asctime)s %(levelname).1s {'' if rank == 0 else f'[rank {rank}] '}%(message)s",
        "%Y-%m-%d %H:%M:%S",
    )
    file = _File(path, encoding="utf-8")
    file.setFormatter(form)
    screen: logging.Handler
    if sys.stdout.isatty():
        screen = RichHandler(console=_console, show_path=False, rich_tracebacks=False, markup=False)
        screen.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    else:
        screen = logging.StreamHandler(sys.stdout)
        screen.setFormatter(form)
    level = logging.INFO if rank == 0 else logging.WARNING
    loggers = [logging.getLogger("vmamba_dist"), logging.getLogger("vmamba_kernels")]
    for logger in loggers:
        logger.setLevel(level)
        logger.addHandler(file)
        logger.addHandler(screen)
        logger.propagate = False
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(file)
            logger.removeHandler(screen)
            logger.propagate = True
        with suppress(OSError):  # what is left of the log on a full disk; the file is closed all the same
            file.close()


class _File(logging.FileHandler):
    """A file that may be full: the terminal has every line, and is told once instead of with a traceback a line."""

    _failing = False

    def emit(self, record: logging.LogRecord) -> None:
        self._failed = False
        super().emit(record)
        self._failing = self._failed

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        self._failed = True
        if not self._failing:
            print(f"{self.baseFilename} cannot be written: {error}", file=sys.stderr)


class Bar:
    """A progress bar over steps; silent where there is no terminal."""

    def __init__(self, progress: Progress | None, total: int | None) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=total) if progress else None

    def show(self, step: int, text: str, total: int | None = None) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step, description=text, total=total)


@contextmanager
def progress_bar(total: int | None) -> Iterator[Bar]:
    """A live bar on a terminal for `total` steps, None while that is unknown; nothing elsewhere."""
    if not sys.stdout.isatty():
        yield Bar(None, total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_console) as progress:
        yield Bar(progress, total)
