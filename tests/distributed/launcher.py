"""A launcher whose processes are real and whose imports are paid once.

Law: it forks what a fresh start would have become after its imports: a launcher with ranks below it, each with
the environment that a launcher gives, each ended by the kernel when its launcher dies.

Importing torch takes seconds a process, and a kill test starts dozens; nothing of torch but its import has
happened before the fork.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Start:
    """One start of a run: the launcher's process and its ranks'."""

    def __init__(self, launcher: int, ranks: list[int]) -> None:
        self.launcher = launcher
        self.ranks = ranks

    def alive(self) -> list[int]:
        return [pid for pid in [self.launcher, *self.ranks] if _alive(pid)]

    def kill(self, pid: int) -> None:
        if _alive(pid):
            os.kill(pid, signal.SIGKILL)


class Launcher:
    """A process that has imported the trainer, and forks starts of runs."""

    def __init__(self) -> None:
        paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]
        self._server = subprocess.Popen(
            [sys.executable, "-c", "from distributed.launcher import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        )

    def start(self, size: int, words: list[str], output: Path) -> Start:
        """Start a run on `size` ranks; what they print is appended to `output`."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps({"size": size, "words": words, "output": str(output)}) + "\n")
        self._server.stdin.flush()
        told = json.loads(self._server.stdout.readline())
        return Start(told["launcher"], told["ranks"])

    def wait(self, start: Start, limit_s: float) -> None:
        """Wait until no process of a start is left; raises TimeoutError, and kills them, after limit_s."""
        deadline = time.monotonic() + limit_s
        while start.alive():
            if time.monotonic() > deadline:
                for pid in start.alive():
                    start.kill(pid)
                raise TimeoutError(f"a start of {len(start.ranks)} ranks did not end in {limit_s} s")
            time.sleep(0.02)

    def close(self) -> None:
        with self._server:  # closes its pipes
            self._server.kill()


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def serve() -> None:
    """Fork a launcher for each line of standard input: {size, words, output}."""
    import torch

    import vmamba_dist.train  # noqa: F401 - what the ranks need, imported before they are forked

    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # launchers are not waited for
    for line in sys.stdin:
        order = json.loads(line)
        receive, send = os.pipe()
        launcher = os.fork()
        if launcher == 0:
            os.close(receive)
            _launch(order["size"], order["words"], order["output"], send)
        os.close(send)
        with os.fdopen(receive) as told:
            ranks = json.loads(told.readline())
        print(json.dumps({"launcher": launcher, "ranks": ranks}), flush=True)


def _launch(size: int, words: list[str], output: str, tell: int) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    out = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    meeting = Path(tempfile.mkdtemp()) / "rendezvous"
    ranks = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            os.close(tell)
            _be_rank(rank, size, words, meeting)
        ranks.append(pid)
    with os.fdopen(tell, "w") as pipe:
        pipe.write(json.dumps(ranks) + "\n")
    failed = 0
    for _ in ranks:  # as torchrun does: the first that fails takes the others with it
        _, status = os.wait()
        if status and not failed:
            failed = status
            for pid in ranks:
                if _alive(pid):
                    os.kill(pid, signal.SIGKILL)
    os._exit(os.waitstatus_to_exitcode(failed) % 256)


def _be_rank(rank: int, size: int, words: list[str], meeting: Path) -> None:
    from vmamba_dist.core.dist import end_with_parent
    from vmamba_dist.train.__main__ import main

    code = 1
    try:
        end_with_parent()
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "VMAMBA_RENDEZVOUS": meeting.as_uri(),
        }
        code = main(words)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
