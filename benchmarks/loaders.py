"""The training stream beside the pipelines of timm and open_clip and plain webdataset, on the same shards.

Law: each makes batches of the same size with the same transform (the full recipe's, by Pillow) from the same JPEGs in
as many reader processes, and decodes as it does by itself; they are measured in turn, in a window after all rings and
shuffle buffers are full. CPU time is that of all processes together in the window.

timm's is timm's own dataset. open_clip's is written out of webdataset's stages as its data.py puts them together
(shards shuffled and split, samples shuffled in a buffer of 5,000, decoded, batched in the worker): its own function
wants captions and a tokenizer. Ours alone has an exact order, resumes anywhere, and replaces a bad sample by a known
one.
"""

import argparse
import os
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import webdataset as wds
from PIL import Image
from report import publish, table
from stream import AUGMENT, BATCH, SIZE, make_shards
from torch import Tensor
from torch.utils.data import DataLoader

from vmamba_dist.config.schema import DataConfig
from vmamba_dist.data.augment import TrainTransform
from vmamba_dist.data.order import choose_lanes
from vmamba_dist.data.prepare import Decoder
from vmamba_dist.data.shards import Index
from vmamba_dist.data.stream import TrainStream

Batches = Iterator[Tensor]  # (BATCH, 3, SIZE, SIZE) uint8
Open = Callable[[Index, int], Any]  # a context that gives Batches


@dataclass(frozen=True)
class Cost:
    """A window of one loader."""

    cpu: float  # s an image
    images: float  # a second


class Seeded:
    """The recipe's transform, with a seed for each call."""

    def __init__(self) -> None:
        self._transform = TrainTransform(AUGMENT, SIZE)
        self._calls = 0

    def __call__(self, image: Image.Image) -> Tensor:
        self._calls += 1
        return self._transform(image, self._calls)


def ours(decoder: Decoder) -> Open:
    @contextmanager
    def opened(index: Index, workers: int) -> Iterator[Batches]:
        data = DataConfig(image_size=SIZE, global_batch=BATCH, workers=workers, decoder=decoder)
        lanes = choose_lanes(
            index.num_samples,
            index.mean_bytes,
            block=data.block,
            shuffle_gib=data.shuffle_gib,
            workers=workers,
        )
        stream = TrainStream(index, data, AUGMENT, seed=0, lanes=lanes)
        yield (batch.images for batch in stream.batches())
        stream.close()

    return opened


def urls(index: Index) -> list[str]:
    return [str(index.root / shard.filename) for shard in index.shards]


def to_sample(sample: dict[str, Any], transform: Seeded) -> tuple[Tensor, int]:
    return transform(sample["jpg"]), sample["cls"]


def loaded(dataset: Any, workers: int, batch: int | None) -> Batches:
    loader = DataLoader(dataset, batch_size=batch, num_workers=workers, persistent_workers=True)
    while True:
        for images, labels in loader:
            assert len(labels) == len(images)
            if len(images) == BATCH:  # a loader of finite epochs may end one with less
                yield images


@contextmanager
def plain_webdataset(index: Index, workers: int) -> Iterator[Batches]:
    """As webdataset's own documentation has it."""
    transform = Seeded()
    dataset = (
        wds.WebDataset(urls(index), shardshuffle=100, nodesplitter=wds.split_by_node)
        .shuffle(1000)
        .decode("pil")
        .map(lambda sample: to_sample(sample, transform))
        .batched(BATCH, partial=False)
        .repeat()
    )
    with closing_loader(loaded(dataset, workers, None)) as batches:
        yield batches


@contextmanager
def open_clip(index: Index, workers: int) -> Iterator[Batches]:
    transform = Seeded()
    stages = (
        wds.SimpleShardList(urls(index)),
        wds.detshuffle(bufsize=2000, initial=500, seed=0),
        wds.split_by_node,
        wds.split_by_worker,
        wds.tarfile_to_samples(handler=wds.warn_and_continue),
        wds.shuffle(bufsize=5000, initial=1000, rng=random.Random(0)),
        wds.select(lambda sample: "cls" in sample and "jpg" in sample),
        wds.decode("pilrgb", handler=wds.warn_and_continue),
        wds.map(lambda sample: to_sample(sample, transform)),
        wds.batched(BATCH, partial=False),
    )
    with closing_loader(loaded(wds.DataPipeline(*stages).repeat(), workers, None)) as batches:
        yield batches


@contextmanager
def by_timm(index: Index, workers: int) -> Iterator[Batches]:
    dataset = timm.data.create_dataset(
        "wds/crops", root=str(index.root), split=index.split, is_training=True, batch_size=BATCH
    )
    dataset.transform = Seeded()
    dataset.set_loader_cfg(num_workers=workers)
    with closing_loader(loaded(dataset, workers, BATCH)) as batches:
        yield batches


@contextmanager
def closing_loader(batches: Batches) -> Iterator[Batches]:
    """Give a loader's batches; its processes are ended with it."""
    try:
        yield batches
    finally:
        batches.close()  # type: ignore[attr-defined]


LOADERS: dict[str, Open] = {
    "`TrainStream`": ours("pil"),
    "`TrainStream`, `data.decoder=torchvision`": ours("torchvision"),
    "plain webdataset": plain_webdataset,
    "open_clip's stages": open_clip,
    "timm's WebDataset reader": by_timm,
}


def measure(opened: Open, index: Index, workers: int, warm: int, count: int) -> Cost:
    with opened(index, workers) as batches:
        for _ in range(warm):
            next(batches)
        cpu, begin = cpu_of_all(), time.perf_counter()
        for _ in range(count):
            images = next(batches)
            assert images.shape == (BATCH, 3, SIZE, SIZE)
            assert images.dtype == torch.uint8
        return Cost((cpu_of_all() - cpu) / (count * BATCH), count * BATCH / (time.perf_counter() - begin))


def cpu_of_all() -> float:
    """CPU seconds of this process and of its living children, to the kernel's tick."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    ticks = 0
    for task in Path("/proc/self/task").iterdir():
        for child in (task / "children").read_text().split():
            user, system = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[11:13]
            ticks += int(user) + int(system)
    return usage.ru_utime + usage.ru_stime + ticks / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7, help="over all loaders (default %(default)s)")
    parser.add_argument(
        "--batches", type=int, default=24, help=f"of {BATCH} images, a window (default %(default)s)"
    )
    parser.add_argument("--workers", type=int, nargs="+", default=(1, 2), help="(default 1 2)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, names = [], list(LOADERS)
    with tempfile.TemporaryDirectory() as folder:
        index = make_shards(Path(folder), 3072)
        for workers in args.workers:
            found: dict[str, list[Cost]] = {name: [] for name in LOADERS}
            for i in range(args.rounds):
                turn = i % len(names)
                for name in names[turn:] + names[:turn]:
                    cost = measure(LOADERS[name], index, workers, 4 * workers, args.batches)
                    found[name].append(cost)
            own = found["`TrainStream`"]
            for name, costs in found.items():
                ratios = [theirs.cpu / mine.cpu for mine, theirs in zip(own, costs, strict=True)]
                faster = [mine.images / theirs.images for mine, theirs in zip(own, costs, strict=True)]
                rows.append(
                    (
                        name,
                        workers,
                        f"{1e3 * statistics.median(cost.cpu for cost in costs):.2f}",
                        f"{statistics.median(cost.images for cost in costs):.0f}",
                        f"{statistics.median(ratios):.3f}",
                        f"{min(ratios):.3f} … {max(ratios):.3f}",
                        f"{statistics.median(faster):.3f}",
                        f"{min(faster):.3f} … {max(faster):.3f}",
                    )
                )
    columns = (
        "loader",
        "workers",
        "CPU ms/image",
        "images/s",
        "CPU time over `TrainStream`'s",
        "range",
        "`TrainStream`'s images/s over its",
        "range",
    )
    body = [
        *table(columns, rows),
        "",
        f"{args.rounds} rounds over all loaders in changing order, {args.batches} batches of {BATCH} a window, {SIZE} "
        f"px JPEGs of {index.mean_bytes / 1024:.0f} KiB, the full recipe's host transforms. Ratios are within a round; "
        f"above 1, `TrainStream` is the cheaper or the faster. timm {timm.__version__}, webdataset {wds.__version__}.",
    ]
    publish("loaders_cpu", "Training stream against other WebDataset pipelines", body)


if __name__ == "__main__":
    main()
