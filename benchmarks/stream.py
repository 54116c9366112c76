"""The training stream beside a bare loop of as many processes, decoding and transforms, without order and collation.

Law: both make the same number of images with the same transforms from the same shards, in the same number of
reader processes, one after the other in pairs; what is compared is the CPU time of all processes together, from
their start to their end. The images are crops of 224 px of scikit-learn's two photographs, as JPEGs.
"""

import argparse
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from report import publish, table
from sklearn.datasets import load_sample_images
from webdataset.tariterators import group_by_keys, tar_file_iterator

from vmamba_dist.config.schema import AugmentConfig, DataConfig
from vmamba_dist.data.augment import TrainTransform
from vmamba_dist.data.decode import decode
from vmamba_dist.data.draws import sample_seeds
from vmamba_dist.data.order import choose_lanes
from vmamba_dist.data.shards import Index, pack, read_index
from vmamba_dist.data.stream import TrainStream

SIZE = 224
BATCH = 64
AUGMENT = AugmentConfig()


@dataclass(frozen=True)
class Cost:
    """One run; times in seconds."""

    cpu: float
    wall: float
    first: float  # from the start of the processes to the first batch


class FiniteStream(TrainStream):
    """Ends after `count` batches, so that nothing is read ahead that nobody takes."""

    count = 1

    def _schedule(self, begin):  # type: ignore[no-untyped-def]
        return islice(super()._schedule(begin), self.count)


def make_shards(folder: Path, count: int) -> Index:
    """Pack `count` crops of real photographs."""
    rng = np.random.default_rng(0)
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    (folder / "images").mkdir()
    lines = ["path,label"]
    for i in range(count):
        photo = photos[i % 2]
        side = int(rng.integers(SIZE, min(photo.size)))
        left, top = (int(rng.integers(0, length - side + 1)) for length in photo.size)
        crop = photo.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        crop.save(folder / "images" / f"{i:05d}.jpg", quality=90)
        lines.append(f"{i:05d}.jpg,{i % 10}")
    (folder / "images" / "list.csv").write_text("\n".join(lines))
    pack(folder / "images" / "list.csv", folder / "set", name="crops", samples_per_shard=128)
    return read_index(folder / "set")


def bare(index: Index, workers: int, batches: int, seed: int = 0) -> Cost:
    """Decode and transform as many images as `batches` hold, and drop them."""
    seeds = sample_seeds(seed, 0, range(batches * BATCH))

    def read(worker: int, images: int) -> Iterator[None]:
        own_seeds = iter(seeds[worker::workers])
        transform = TrainTransform(AUGMENT, SIZE)
        while True:
            for shard in index.shards[worker::workers]:
                with (index.root / shard.filename).open("rb") as file:
                    members = ({**member, "__url__": ""} for member in tar_file_iterator(file))
                    for sample in group_by_keys(members):
                        transform(decode(sample["jpg"]), next(own_seeds))
                        int(sample["cls"])
                        images -= 1
                        yield
                        if images == 0:
                            return

    def run(worker: int, first: "multiprocessing.synchronize.Semaphore") -> None:
        torch.set_num_threads(1)
        each = batches * BATCH // workers
        made = read(worker, each)
        list(islice(made, BATCH // workers))
        first.release()
        for _ in made:
            pass

    context = multiprocessing.get_context("fork")
    before, begin = cpu_time(), time.perf_counter()
    first = context.Semaphore(0)
    processes = [context.Process(target=run, args=(worker, first)) for worker in range(workers)]
    for process in processes:
        process.start()
    for _ in processes:
        first.acquire()
    latency = time.perf_counter() - begin
    for process in processes:
        process.join()
        if process.exitcode:
            raise RuntimeError(f"the bare loop ended with exit code {process.exitcode}")
    return Cost(cpu_time() - before, time.perf_counter() - begin, latency)


def streamed(index: Index, workers: int, batches: int, seed: int = 0) -> Cost:
    """Take `batches` batches of the training stream."""
    before, begin = cpu_time(), time.perf_counter()
    data = DataConfig(image_size=SIZE, global_batch=BATCH, workers=workers)
    lanes = choose_lanes(
        index.num_samples, index.mean_bytes, block=data.block, shuffle_gib=data.shuffle_gib, workers=workers
    )
    stream = FiniteStream(index, data, AUGMENT, seed=seed, lanes=lanes)
    stream.count = batches
    taken = stream.batches()
    images = next(taken).images.shape[0]
    latency = time.perf_counter() - begin
    for batch in taken:
        images += batch.images.shape[0]
    stream.close()
    if images != batches * BATCH:
        raise RuntimeError(f"the stream gave {images} images, asked were {batches * BATCH}")
    return Cost(cpu_time() - before, time.perf_counter() - begin, latency)


def cpu_time() -> float:
    """CPU seconds of this process and of its children that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pairs", type=int, default=15, help="interleaved pairs (%(default)s)")
    parser.add_argument("--batches", type=int, default=24, help=f"of {BATCH} images a run (%(default)s)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows, notes = [], []
    with tempfile.TemporaryDirectory() as folder:
        index = make_shards(Path(folder), given.batches * BATCH)
        images = given.batches * BATCH
        for workers in (1, 2):
            bare(index, workers, 1)
            streamed(index, workers, 1)
            pairs = []
            for i in range(given.pairs):
                if i % 2:
                    stream_cost = streamed(index, workers, given.batches, i)
                    bare_cost = bare(index, workers, given.batches, i)
                else:
                    bare_cost = bare(index, workers, given.batches, i)
                    stream_cost = streamed(index, workers, given.batches, i)
                pairs.append((bare_cost, stream_cost))
            ratios = sorted(s.cpu / b.cpu - 1 for b, s in pairs)
            rows.append(
                (
                    workers,
                    f"{statistics.median(ratios):+.1%}",
                    f"{ratios[0]:+.1%} … {ratios[-1]:+.1%}",
                    f"{1e3 * statistics.median(b.cpu for b, _ in pairs) / images:.2f}",
                    f"{1e3 * statistics.median(s.cpu for _, s in pairs) / images:.2f}",
                    f"{images / statistics.median(b.wall for b, _ in pairs):.0f}",
                    f"{images / statistics.median(s.wall for _, s in pairs):.0f}",
                    f"{1e3 * statistics.median(b.first for b, _ in pairs):.0f}",
                    f"{1e3 * statistics.median(s.first for _, s in pairs):.0f}",
                )
            )
        notes = [
            "",
            f"{given.pairs} interleaved pairs a row, {images} images a run, batches of {BATCH}, {SIZE} px JPEGs of "
            f"{index.mean_bytes / 1024:.0f} KiB, the full recipe's host transforms (crop, flip, RandAugment), drawn "
            "anew in each pair and alike in its two runs. Overhead is of CPU time over all processes, their start "
            "included; the bar is 5 %. First batch: from the start of the processes (forked, all imported) until its "
            "images are there.",
        ]
    columns = ("workers", "overhead, median", "range", "bare, CPU ms/image", "stream, CPU ms/image")
    columns += ("bare, images/s", "stream, images/s", "bare, first batch ms", "stream, first batch ms")
    publish("stream_cpu", "Training stream against a bare loop", [*table(columns, rows), *notes])


if __name__ == "__main__":
    main()
