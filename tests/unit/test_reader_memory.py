"""A reader's memory does not grow with what it has read."""

from __future__ import annotations

import multiprocessing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vmamba_dist.config.schema import AugmentConfig, DataConfig
from vmamba_dist.data.prepare import Decoder
from vmamba_dist.data.shards import pack
from vmamba_dist.data.sidecar import open_index, write_all
from vmamba_dist.data.stream import TrainStream

SAMPLES = 100_000
SET = 2_000
BATCH = 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("memory")
    rng = np.random.default_rng(0)
    for label in "ab":
        (made / "images" / label).mkdir(parents=True)
        for i in range(SET // 2):
            noise = Image.fromarray(rng.integers(0, 256, (24, 20 + i % 9, 3), dtype=np.uint8))
            noise.save(made / "images" / label / f"{i:05d}.{'png' if i % 50 == 0 else 'jpg'}")
    pack(made / "images", made / "set", samples_per_shard=50)
    write_all(made / "set")
    return made / "set"


def resident(pid: int | None) -> int:
    """Bytes of memory that a process holds and no file backs."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["pil", "torchvision", "gpu"])
def test_a_readers_memory_is_flat_over_100_000_samples(folder: Path, decoder: Decoder) -> None:
    """Within 2 %, of a worker process, from its 20,000th sample, ten epochs, on."""
    data = DataConfig(image_size=16, global_batch=BATCH, workers=1, decoder=decoder)
    stream = TrainStream(open_index(folder), data, AugmentConfig(), seed=0, lanes=24)
    batches = stream.batches()
    (worker,) = (process for process in multiprocessing.active_children() if process.name == "reader-0")
    held = []
    for samples in range(0, SAMPLES + 20_001, 10_000):
        if samples >= 20_000:
            held.append(resident(worker.pid))
        for _ in islice(batches, 10_000 // BATCH):
            pass
    stream.close()
    assert len(held) == 11
    assert max(held) <= 1.02 * held[0], [f"{value / 2**20:.1f} MiB" for value in held]
