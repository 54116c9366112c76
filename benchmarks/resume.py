"""A resume in the middle of an epoch, from imported workers to the first batch: seconds, and bytes read of the shards.

Law: the set, the lanes and the batch are those of the bar (1,000 shards of 20 kB samples, 480 lanes, blocks of 16);
what is timed is everything from the address on: the index, the order, forking the readers, reading, decoding. Bytes are
counted where they are read or sent, and held against two blocks for each lane that the first batch touches. Local files
were just written, so they come from memory and not from a disk; S3 is moto's server, in a process on the same cores.
"""

import argparse
import dataclasses
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import boto3
import numpy as np
from PIL import Image
from report import publish, table

from vmamba_dist.config.schema import AugmentConfig, DataConfig, S3Config
from vmamba_dist.data.order import EpochOrder
from vmamba_dist.data.sets import open_set
from vmamba_dist.data.shards import pack
from vmamba_dist.data.sources import Source
from vmamba_dist.data.stream import TrainStream

SHARDS, PER_SHARD, LANES, BLOCK = 1000, 40, 480, 16
SIDE = 81  # px: 20 kB of noise as a PNG
BUCKET = "resume"
DATA = DataConfig(image_size=64, global_batch=256, workers=2, block=BLOCK)


def make_set(folder: Path) -> Path:
    """Pack noise of about 20 kB an image: a hundred images, under many names."""
    rng = np.random.default_rng(0)
    images = folder / "images"
    images.mkdir()
    count = SHARDS * PER_SHARD
    for i in range(count):
        if i < 100:
            pixels = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(images / f"{i:06d}.png")
        else:
            (images / f"{i:06d}.png").hardlink_to(images / f"{i % 100:06d}.png")
    (images / "list.csv").write_text(
        "path,label\n" + "".join(f"{i:06d}.png,{i % 10}\n" for i in range(count))
    )
    pack(images / "list.csv", folder / "set", name="noise", samples_per_shard=PER_SHARD)
    return folder / "set"


@contextmanager
def moto() -> Iterator[str]:
    """Run moto's S3 in a process of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def upload(url: str, folder: Path) -> None:
    bucket = boto3.client("s3", endpoint_url=url)
    bucket.create_bucket(Bucket=BUCKET)
    for path in sorted(folder.iterdir()):
        bucket.put_object(Bucket=BUCKET, Key=f"set/{path.name}", Body=path.read_bytes())


class Counted:
    """A source that writes how much it reads to a file that all readers share."""

    def __init__(self, inner: Source, tally: Path) -> None:
        self._inner = inner
        self._tally = os.open(tally, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.concurrency = inner.concurrency

    def read(self, shard: int, start: int, end: int) -> bytes:
        data = self._inner.read(shard, start, end)
        os.write(self._tally, len(data).to_bytes(8, "little"))
        return data

    def close(self) -> None:
        self._inner.close()


class FirstBatch(TrainStream):
    """Ends after one batch, so that nothing is read ahead that nobody takes."""

    def _schedule(self, begin):  # type: ignore[no-untyped-def]
        return islice(super()._schedule(begin), 1)


def resume(address: str, endpoint: str, folder: Path) -> dict[str, float]:
    """Open the set and take one batch from the middle of an epoch; the imports are done."""
    data = dataclasses.replace(DATA, s3=S3Config(endpoint))
    begun, cpu = time.perf_counter(), os.times()
    index = open_set(address, "train", data=data, keep=folder / "index")
    opened = time.perf_counter()
    tally = folder / "tally"
    tally.unlink(missing_ok=True)
    counted = dataclasses.replace(index, opener=lambda: Counted(index.source(), tally))
    stream = FirstBatch(counted, data, AugmentConfig(), seed=0, lanes=LANES)
    offset = stream.steps_per_epoch // 2 * data.global_batch
    batch = next(stream.batches(0, offset))
    seconds = time.perf_counter() - begun
    stream.close()
    now = os.times()
    order = EpochOrder(0, 0, index.lengths, LANES, BLOCK)
    lanes = {order.place(p)[0] for p in batch.positions.tolist()}
    read = np.frombuffer(tally.read_bytes(), "<u8")
    return {
        "seconds": seconds,
        "opened": opened - begun,
        "cpu": sum(now[:4]) - sum(cpu[:4]),
        "lanes": len(lanes),
        "reads": len(read),
        "bytes": int(read.sum()),
        "allowed": int(2 * len(lanes) * BLOCK * index.mean_bytes),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--one", nargs=3, help=argparse.SUPPRESS
    )  # address, endpoint, folder: a process of its own
    given = parser.parse_args()
    if given.one:
        address, endpoint, folder = given.one
        print(json.dumps(resume(address, endpoint, Path(folder))))
        return
    with tempfile.TemporaryDirectory() as name, moto() as endpoint:
        folder = Path(name)
        made = make_set(folder)
        upload(endpoint, made)
        rows = []
        for where, address, bar in (
            ("local files", str(made), 2.0),
            ("S3 (moto)", f"s3://{BUCKET}/set", 5.0),
        ):
            run = folder / where.partition(" ")[0]
            run.mkdir()
            found = [one(address, endpoint, run) for _ in range(given.rounds + 1)]
            first, again = found[0], found[1:]
            for at in found:
                assert at["bytes"] <= at["allowed"], at
            middle = sorted(again, key=lambda at: at["seconds"])[len(again) // 2]
            rows.append(
                [
                    where,
                    f"{first['seconds']:.2f}",
                    f"{statistics.median(at['seconds'] for at in again):.2f}",
                    f"{min(at['seconds'] for at in again):.2f} … {max(at['seconds'] for at in again):.2f}",
                    f"{middle['cpu']:.2f}",
                    f"≤ {bar:g}",
                    f"{middle['lanes']:.0f}",
                    f"{middle['reads']:.0f}",
                    f"{middle['bytes'] / 1e6:.1f}",
                    f"{middle['allowed'] / 1e6:.1f}",
                ]
            )
    publish(
        "resume",
        "Resume in the middle of an epoch",
        [
            f"{SHARDS} shards of {PER_SHARD} samples of about 20 kB, {LANES} lanes, blocks of {BLOCK}, a batch of "
            f"{DATA.global_batch}, {DATA.workers} readers; {given.rounds} resumes, each a process of its own. "
            "Seconds are from the address to the first batch, imports done: the median, and all of them. The "
            f"machine is noisy: other work shared its cores (load {os.getloadavg()[1]:.0f} on {os.cpu_count()}), "
            "and so did moto's server; so the CPU time of a run and its readers, without the server's, stands beside.",
            "",
            *table(
                [
                    "from",
                    "first start, s",
                    "resume, s",
                    "all, s",
                    "CPU, s",
                    "bar, s",
                    "lanes",
                    "reads",
                    "read, MB",
                    "2 blocks, MB",
                ],
                rows,
            ),
            "",
            "A first start has no kept index in its run directory yet. Bytes are those of the shards.",
        ],
    )


def one(address: str, endpoint: str, folder: Path) -> dict[str, float]:
    words = [sys.executable, __file__, "--one", address, endpoint, str(folder)]
    done = subprocess.run(words, check=True, capture_output=True, text=True, timeout=120)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


if __name__ == "__main__":
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        os.environ[name] = "nobody"
    os.environ["AWS_DEFAULT_REGION"] = "us-east-1"
    main()
