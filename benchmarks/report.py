"""What every table needs around it: where, with what and how it was measured, and one place where results go.

Nothing here names a host or a folder of the machine: an absolute path in the command is told as PATH.
"""

import datetime
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from gpu import description

from vmamba_dist.core.machine import cores, processor

RESULTS = Path(__file__).parent / "results"


def header() -> list[str]:
    """Return markdown lines: machine, GPU where one is in use, versions, command and date of this run."""
    words = ("PATH" if Path(word).is_absolute() else word for word in sys.argv[1:])
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])
    threads = torch.get_num_threads()
    return [
        f"- machine: {processor()}, {cores()} cores; {threads} torch thread{'s' if threads > 1 else ''}",
        *(description() if torch.cuda.is_initialized() else ()),
        f"- versions: Python {platform.python_version()}, torch {torch.__version__}, {platform.system()}",
        f"- command: `{command}`",
        f"- date: {datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
    ]


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Return a markdown table as lines; numbers stand right."""
    lines = [f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    return lines + [f"| {' | '.join(str(cell) for cell in row)} |" for row in rows]


def publish(name: str, title: str, body: Iterable[str], folders: Sequence[Path] = (RESULTS,)) -> None:
    """Print a report, and write it to NAME.md in each of the folders."""
    text = "\n".join([f"# {title}", "", *header(), "", *body, ""])
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.md").write_text(text)
    print(text, flush=True)
