"""Order and read plan of one rank of very many, from the binary sidecar, beside reading the JSON index.

Law: every row is a process of its own that has imported what it needs before the clock starts; memory is the most that
it holds resident beyond that. The set has its real index files, offsets of every sample included, and no tars: the
order and the plan look at none.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from report import publish, table

from vmamba_dist.data.order import EpochOrder, Share, choose_lanes
from vmamba_dist.data.shards import INFO, Index, Offsets, Shard
from vmamba_dist.data.sidecar import LargeIndex, open_index, path_of, write
from vmamba_dist.data.sources import BLOCK

SAMPLE_BLOCKS = 41  # of 512 bytes: 20 kB with its headers
BLOCK_SIZE = 16
UPDATES = 1000  # planned
Step = tuple[str, Callable[[], object]]


def make_set(root: Path, num_shards: int, per_shard: int) -> None:
    """Write a set's index, offsets and sidecar."""
    rng = np.random.default_rng(0)
    size = (per_shard * SAMPLE_BLOCKS + 2) * BLOCK
    hashes = rng.bytes(32 * num_shards).hex()
    shards = tuple(
        Shard(f"noise-train-{i:07d}.tar", per_shard, size, hashes[64 * i : 64 * i + 64])
        for i in range(num_shards)
    )
    entry = {
        "name": "train",
        "filenames": [shard.filename for shard in shards],
        "shard_lengths": [per_shard] * num_shards,
        "num_samples": per_shard * num_shards,
        "bytes": [size] * num_shards,
        "sha256": [shard.sha256 for shard in shards],
    }
    info = {"name": "noise", "num_classes": 1000, "classes": [], "splits": {"train": entry}}
    (root / INFO).write_text(json.dumps(info))
    index = Index(root, "noise", "train", shards, 1000, (), Offsets.of([]))
    starts = np.arange(per_shard + 1, dtype="<u4") * SAMPLE_BLOCKS
    at_once = max(1, (1 << 24) // starts.nbytes)
    with (root / "_offsets-train.bin").open("wb") as file:
        file.write(Offsets.MAGIC + bytes.fromhex(index.fingerprint()))
        file.write(np.array([num_shards, num_shards * per_shard], dtype="<u8").tobytes())
        file.write(np.full(num_shards, per_shard, dtype="<u4").tobytes())
        for first in range(0, num_shards, at_once):
            file.write(np.tile(starts, min(at_once, num_shards - first)).tobytes())
    write(index)


def plan(index: Index, order: EpochOrder, rank: int, world: int, global_batch: int, updates: int) -> int:
    """Find every block that the rank's first updates touch: its byte ranges, and the order within it."""
    share = Share(global_batch, rank, world)
    positions = np.concatenate([share.positions(step, 0) for step in range(updates)])
    elements, lanes = np.divmod(positions, order.lanes)
    blocks = np.unique(np.stack([lanes, elements // order.block], axis=1), axis=0)
    ranges = 0
    for lane, block in blocks.tolist():
        for run in order.runs(lane, block):
            first, *_, end = index.offsets.bounds(run.shard, run.first, run.count)
            assert end - first == run.count * SAMPLE_BLOCKS * BLOCK
            ranges += 1
        assert len(order.slots(lane, block)) == order.block
    return ranges


def sidecar(root: Path, world: int, global_batch: int, say: Callable[[str, float], None]) -> None:
    index = open_index(root)
    assert isinstance(index, LargeIndex)
    say("open", 0)
    lanes = choose_lanes(
        index.num_samples, index.mean_bytes, block=BLOCK_SIZE, shuffle_gib=4.0, world=world, workers=8
    )
    order = EpochOrder(0, 3, index.lengths, lanes, BLOCK_SIZE)
    say("order", lanes)
    ranges = plan(index, order, world // 3, world, global_batch, UPDATES)
    say("plan", ranges)


def parsed(root: Path, world: int, global_batch: int, say: Callable[[str, float], None]) -> None:
    """What reading the JSON index takes, before any tar is looked at."""
    entry = json.loads((root / INFO).read_text())["splits"]["train"]
    columns = (entry[name] for name in ("filenames", "shard_lengths", "bytes", "sha256"))
    shards = tuple(Shard(*row) for row in zip(*columns, strict=True))
    say("open", len(shards))


def measured(
    what: Callable[[Path, int, int, Callable[[str, float], None]], None],
    root: Path,
    world: int,
    global_batch: int,
) -> dict[str, tuple[float, float, float, float]]:
    """Run in a fresh process: stage → (CPU s so far, wall s so far, MB held at most so far, its number)."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(what, root, world, global_batch, theirs))
    process.start()
    theirs.close()
    found = {}
    try:
        while True:
            stage, *numbers = ours.recv()
            found[stage] = tuple(numbers)
    except EOFError:
        process.join()
    if process.exitcode:
        raise RuntimeError(f"{what.__name__} ended with exit code {process.exitcode}")
    return found


def _measure(
    what: Callable[[Path, int, int, Callable[[str, float], None]], None],
    root: Path,
    world: int,
    global_batch: int,
    end: Connection,
) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    held, cpu, wall = _status("VmRSS"), _cpu(), time.perf_counter()

    def say(stage: str, number: float) -> None:
        end.send((stage, _cpu() - cpu, time.perf_counter() - wall, _status("VmHWM") - held, number))

    what(root, world, global_batch, say)


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _status(name: str) -> float:
    """Return a size of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":")) * 1024 / 1e6


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shards", type=int, default=1_000_000, help="(default %(default)s)")
    parser.add_argument("--per-shard", type=int, default=1000, help="samples a shard (default %(default)s)")
    parser.add_argument("--ranks", type=int, default=1024, help="(default %(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="the median is told (default %(default)s)")
    parser.add_argument(
        "--folder", type=Path, help="for the index files: 4 bytes a sample (default: a temporary one)"
    )
    args = parser.parse_args()
    global_batch = 16 * args.ranks
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        root = Path(folder)
        make_set(root, args.shards, args.per_shard)
        runs = [measured(sidecar, root, args.ranks, global_batch) for _ in range(args.runs)]
        json_runs = [measured(parsed, root, args.ranks, global_batch) for _ in range(2)]
        sizes = [(root / INFO).stat().st_size, path_of(root, "train").stat().st_size]

    def row(
        name: str, stage: str, found: list[dict[str, tuple[float, float, float, float]]]
    ) -> tuple[str, ...]:
        cpu, wall, held, _ = (float(np.median([run[stage][i] for run in found])) for i in range(4))
        return name, f"{cpu:.2f}", f"{wall:.2f}", f"{held:.0f}"

    lanes, ranges = int(runs[0]["order"][3]), int(runs[0]["plan"][3])
    rows = [
        row("sidecar: opened", "open", runs),
        row("… and an epoch's order", "order", runs),
        row(f"… and the plan of {UPDATES:,} updates", "plan", runs),
        row("JSON index: read, no more", "open", json_runs),
    ]
    body = [
        f"{args.shards * args.per_shard:,} samples in {args.shards:,} shards, {args.ranks:,} ranks, {lanes:,} lanes of "
        f"blocks of {BLOCK_SIZE}, {global_batch:,} samples an update. Times and memory are sums from the start, of "
        "one rank, beyond the interpreter with its imports; the bar is 1 s and 200 MB. "
        f"The plan: {ranges:,} byte ranges and the order within each block. JSON index {sizes[0] / 1e6:.0f} MB, "
        f"sidecar {sizes[1] / 1e6:.0f} MB, offsets 4 bytes a sample, of which a block's are read when it is. Medians "
        f"of {args.runs} processes; files in the page cache.",
        "",
        *table(("", "CPU s", "wall s", "MB"), rows),
    ]
    publish("order_cpu", "Order and read plan from the sidecar", body)


if __name__ == "__main__":
    main()
