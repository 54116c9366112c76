"""How long a save halts training, written by the training thread and written behind it, for the state of Base.

Law: both write the same tensors with the same sha256, fsync, manifest and retention, in turns, in one process and one
run of this program; a stall is the time from the call until the next step could start. Before anything is timed, a
save whose tensors change at once must load as they were.
"""

import argparse
import hashlib
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from report import publish, table
from torch import Tensor
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from vmamba_dist.checkpoint.save import Checkpoints
from vmamba_dist.checkpoint.store import Meta
from vmamba_dist.config.schema import CheckpointConfig
from vmamba_dist.core.dist import World
from vmamba_dist.core.rundir import RunDir
from vmamba_dist.models import create_model

MODEL = "vmamba_base_s1l20"
FIRST_BAR, LATER_BAR = 3, 15  # times shorter than a synchronous save


def state_of(model: str, device: torch.device) -> dict[str, Tensor]:
    """Weights, their average, moments and step counts, as a run of one process saves them."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in create_model(model).named_parameters()}
    tensors = {}
    for name, shape in shapes.items():
        for key in ("model.{}", "ema.{}", "optim.{}.exp_avg", "optim.{}.exp_avg_sq"):
            tensors[key.format(name)] = torch.randn(shape, device=device)
        tensors[f"optim.{name}.step"] = torch.zeros((), device=device)
    return tensors


class Training:
    """A small model that learns noise: what else the cores do while a save is written."""

    def __init__(self, device: torch.device) -> None:
        self.model = create_model("vmamba_atto", num_classes=10).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.images = torch.randn(8, 3, 32, 32, device=device)
        self.labels = torch.arange(8, device=device)

    def rate(self, going_on: Callable[[float], bool]) -> float:
        """Steps a second for as long as `going_on(seconds so far)`."""
        begin, steps = time.perf_counter(), 0
        while going_on(time.perf_counter() - begin):
            loss = torch.nn.functional.cross_entropy(self.model(self.images), self.labels)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            steps += 1
            loss.item()
        return steps / (time.perf_counter() - begin)


class Saver:
    """The checkpoints of one run directory."""

    def __init__(self, folder: Path, device: torch.device, *, behind: bool) -> None:
        self.run = RunDir.acquire(folder)
        config = CheckpointConfig(keep=2, async_save=behind)
        self.checkpoints = Checkpoints(self.run, config, World(0, 1, 0, device))
        self.device = device
        self.step = 0

    def save(self, tensors: dict[str, Tensor]) -> float:
        """Save, and return for how many seconds training stands still."""
        self.step += 1
        meta = Meta(self.step, 0, 0, {}, 1, "ddp", "", {})
        synchronize(self.device)
        begin = time.perf_counter()
        self.checkpoints.save(tensors, meta, wait=False)
        synchronize(self.device)
        return time.perf_counter() - begin

    @property
    def writing(self) -> bool:
        thread = self.checkpoints._thread
        return thread is not None and thread.is_alive()

    @property
    def reserving(self) -> bool:
        thread = self.checkpoints._staging._warming
        return thread is not None and thread.is_alive()

    def drain(self) -> float:
        """Wait for the write, and return how long that took."""
        begin = time.perf_counter()
        self.checkpoints.drain()
        if self.checkpoints.failures:
            raise RuntimeError(f"the save failed: {self.checkpoints._failure}")
        return time.perf_counter() - begin

    def close(self) -> None:
        self.checkpoints.close()
        self.run.release()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gate(folder: Path, device: torch.device) -> None:
    """Raise unless what is saved is what was when save was called."""
    saver = Saver(folder, device, behind=True)
    for value in (1.0, 2.0):
        tensors = {"model.w": torch.full((1000, 1000), value, device=device)}
        saver.save(tensors)
        tensors["model.w"].fill_(-1)
        saver.drain()
        found = saver.checkpoints.newest()
        assert found is not None
        saver.checkpoints.load(found, tensors)
        if not bool((tensors["model.w"] == value).all()):
            raise RuntimeError("the save shows what happened after it")
    saver.close()


def disk(folder: Path, nbytes: int) -> tuple[float, float]:
    """GB/s of one file written through to the disk, and of sha256 over it from the page cache."""
    block = os.urandom(2**24)
    begin = time.perf_counter()
    with (folder / "plain").open("wb") as file:
        for _ in range(nbytes // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    written = time.perf_counter() - begin
    begin = time.perf_counter()
    with (folder / "plain").open("rb") as file:
        hashlib.file_digest(file, "sha256")
    hashed = time.perf_counter() - begin
    (folder / "plain").unlink()
    return nbytes / written / 1e9, nbytes / hashed / 1e9


def torchs_own(tensors: dict[str, Tensor], folder: Path, times: int, *, keep: bool) -> list[float]:
    """Stalls of torch's async_save, which neither hashes nor publishes; with `keep` its buffers are kept."""
    stager = DefaultStager(
        StagingOptions(
            use_pinned_memory=torch.cuda.is_available(),
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=torch.cuda.is_available(),
        )
    )
    stalls = []
    for number in range(times):
        path = folder / f"own-{number}"
        begin = time.perf_counter()
        response = state_dict_saver.async_save(
            tensors,
            storage_writer=FileSystemWriter(path, sync_files=True, overwrite=False),
            process_group=dist.group.WORLD,
            async_stager=stager if keep else None,
        )
        stalls.append(time.perf_counter() - begin)
        done = response if hasattr(response, "result") else response.upload_completion
        done.result()
        shutil.rmtree(path)
    return stalls


def filesystem(path: Path) -> str:
    """The type of the file system that a path is on."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    over = [(place, kind) for place, kind in mounts if path.resolve().is_relative_to(place)]
    return max(over, key=lambda found: len(found[0]))[1]


def later(values: list[float]) -> float:
    return statistics.median(values[1:])


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--saves", type=int, default=6, help="of each kind (%(default)s)")
    parser.add_argument("--model", default=MODEL, help="(%(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument("--dir", type=Path, help="where to write; else the system's temporary folder")
    parser.add_argument("--name", default="checkpoint", help="of the file under results/ (%(default)s)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning)  # torch's async_save, of a process alone
    device = torch.device(given.device, 0) if given.device == "cuda" else torch.device(given.device)
    load = os.getloadavg()[0]

    with tempfile.TemporaryDirectory(dir=given.dir) as name:
        folder = Path(name)
        gate(folder / "gate", device)
        training = Training(device)
        training.rate(lambda seconds: seconds < 1)
        tensors = state_of(given.model, device)
        nbytes = sum(t.nbytes for t in tensors.values())
        write_speed, hash_speed = disk(folder, nbytes)

        cold = Saver(folder / "cold", device, behind=True)
        unreserved = cold.save(tensors)
        cold.drain()
        cold.close()
        shutil.rmtree(folder / "cold")
        waited = Saver(folder / "waited", device, behind=False)
        behind = Saver(folder / "behind", device, behind=True)
        begin = time.perf_counter()
        behind.checkpoints.reserve(tensors)
        reserving = training.rate(lambda _: behind.reserving)
        reserved = time.perf_counter() - begin
        full, stall, writing, alone, meanwhile = [], [], [], [], []
        for _ in range(given.saves):
            full.append(waited.save(tensors))
            stall.append(behind.save(tensors))
            writing.append(behind.drain())
        for _ in range(3):
            alone.append(training.rate(lambda seconds: seconds < 5))
            behind.save(tensors)
            meanwhile.append(training.rate(lambda _: behind.writing))
            behind.drain()
        waited.close()
        behind.close()
        kind = filesystem(folder)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        fresh = torchs_own(tensors, folder, 4, keep=False)
        kept = torchs_own(tensors, folder, 4, keep=True)
        dist.destroy_process_group()

    def row(what: str, values: list[float], compared: bool = True) -> tuple[str, ...]:
        first, rest = values[0], later(values)
        ratios = (f"{full[0] / first:.1f}×", f"{later(full) / rest:.0f}×") if compared else ("1", "1")
        return (
            what,
            f"{first:.2f}",
            f"{rest:.3f}",
            f"{min(values[1:]):.3f} … {max(values[1:]):.3f}",
            *ratios,
        )

    columns = (
        "save",
        "first, s",
        "later, median s",
        "later, range s",
        "first, shorter by",
        "later, shorter by",
    )
    rows = [
        row("written by the training thread", full, compared=False),
        row("copied, then written behind it", stall),
        row("torch's async_save, no sha256", fresh),
        row("the same with its stager kept", kept),
    ]
    met = full[0] / unreserved >= FIRST_BAR and later(full) / later(stall) >= LATER_BAR
    share = statistics.median(meanwhile) / statistics.median(alone)
    body = [
        *table(columns, rows),
        "",
        f"For how long a save halts training. {given.model}: weights, average and moments, {len(tensors)} tensors, "
        f"{nbytes / 1e9:.2f} GB, one process; {given.saves} saves of each of the first two kinds in turns, both with "
        "sha256, fsync, manifest and retention, after a check that a save shows nothing of what follows it. The bars "
        f"are {FIRST_BAR}× for the first save and {LATER_BAR}× for the later ones: "
        f"{'met' if met else 'MISSED'}. Writing behind took {statistics.median(writing):.1f} s in the median.",
        "",
        f"The memory for the copies is found while training begins, in the background: that took {reserved:.1f} s, "
        f"with the small model below at {reserving:.1f} steps/s; it is then held from the start on. Without it the "
        f"first save halts training for {unreserved:.2f} s, "
        f"{full[0] / unreserved:.1f}× shorter than a synchronous one. It is kept for all later saves.",
        "",
        f"Disk ({kind}): {write_speed:.2f} GB/s of one plain file of that size through to the disk, sha256 "
        f"{hash_speed:.2f} GB/s; a synchronous save is {nbytes / later(full) / 1e9:.2f} GB/s. Load average at the "
        f"start {load:.1f}.",
        "",
        f"Steps of a small model meanwhile, on the same cores: {statistics.median(meanwhile):.1f}/s during a write "
        f"against {statistics.median(alone):.1f}/s without, {share:.0%} (three turns of each: "
        f"{', '.join(f'{m / a:.0%}' for m, a in zip(meanwhile, alone, strict=True))}).",
    ]
    publish(given.name, "A save, and what it costs training", body)


if __name__ == "__main__":
    main()
