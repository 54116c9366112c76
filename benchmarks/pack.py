"""`vmamba shards pack` on one core, in CPU time, beside the bare loop over the same images.

Law: every row packs the same images, and what is counted is the CPU time of this process from the start of the
pack to its end, listing and publishing included; rows and the bare loop take turns in one run. The images are
crops of scikit-learn's two photographs as JPEGs of about 150 kB.
"""

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, features
from report import publish, table
from sklearn.datasets import load_sample_images

from vmamba_dist.data.shards import pack, verify

SIDE = 512  # px that the resized images' longer side has
QUALITY = 90


def make_images(folder: Path, count: int) -> float:
    """Write `count` JPEGs of 640 × 427 photographs, cropped, flipped and with grain; returns their mean bytes."""
    rng = np.random.default_rng(0)
    photos = [np.asarray(photo) for photo in load_sample_images().images]
    sizes = []
    for i in range(count):
        photo = photos[i % 2].astype(np.int16)
        top, left = rng.integers(0, 12), rng.integers(0, 12)
        crop = photo[top : top + 415, left : left + 628]
        crop = np.clip(crop + rng.normal(0, 12, crop.shape).astype(np.int16), 0, 255).astype(np.uint8)
        image = Image.fromarray(crop[:, :: 1 if i % 4 < 2 else -1])
        path = folder / f"class{i % 10}" / f"{i:05d}.jpg"
        path.parent.mkdir(exist_ok=True)
        image.save(path, quality=93)
        sizes.append(path.stat().st_size)
    return float(np.mean(sizes))


def bare(folder: Path) -> None:
    """Open, decode, resize and encode every image, as short as Pillow allows, and drop it."""
    for path in sorted(folder.rglob("*.jpg")):
        image = Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
        scale = SIDE / max(image.size)
        width, height = (round(side * scale) for side in image.size)
        image.resize((width, height), Image.Resampling.BICUBIC).save(io.BytesIO(), "JPEG", quality=QUALITY)


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=400, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of all rows (%(default)s)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "in").mkdir()
        mean_bytes = make_images(folder / "in", given.images)

        def packing(**options: object) -> Callable[[], None]:
            def run() -> None:
                out = folder / "out"
                report = pack(folder / "in", out, workers=1, overwrite=True, **options)  # type: ignore[arg-type]
                if report.samples["train"] != given.images:
                    raise RuntimeError(str(report))

            return run

        runs: dict[str, Callable[[], None]] = {
            "header check, sha256": packing(),
            "every image decoded, sha256": packing(check="decode"),
            f"resized to {SIDE} px and encoded anew, sha256": packing(max_side=SIDE, quality=QUALITY),
            f"bare Pillow loop: decode, resize to {SIDE} px, encode": lambda: bare(folder / "in"),
        }
        times: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(given.rounds + 1):
            for name, run in runs.items():
                begin = time.process_time()
                run()
                if turn:  # the first warms caches
                    times[name].append(time.process_time() - begin)
        found = verify(folder / "out")
        if not found.ok:
            raise RuntimeError(str(found))
    *packs, loop = runs
    rows = []
    bars = {packs[0]: "≥ 1,000", packs[1]: "≥ 250", packs[2]: "≥ 85 % of the bare loop", loop: ""}
    for name in runs:
        rates = sorted(given.images / t for t in times[name])
        shares = [b / t for b, t in zip(times[loop], times[name], strict=True)]
        share = f"{statistics.median(shares):.0%}" if name == packs[2] else ""
        spread = f"{rates[0]:.0f} … {rates[-1]:.0f}"
        rows.append((name, f"{statistics.median(rates):.0f}", spread, share, bars[name]))
    notes = [
        "",
        f"{given.images} JPEGs of {mean_bytes / 1000:.0f} kB and 628 × 415 px, {given.rounds} rounds in which every "
        "row has its turn; images a second of CPU time (user and system) of one process, median and range. The share "
        "is the median over rounds. Files are in the page cache; shards are flushed to the disk, whose waiting costs "
        f"no CPU time. Pillow {PIL.__version__} with libjpeg-turbo {features.version_feature('libjpeg_turbo')}.",
    ]
    columns = ("what is done with each image", "images/s/core", "range", "of the bare loop", "bar")
    publish("pack", "Packing shards on one core", [*table(columns, rows), *notes])


if __name__ == "__main__":
    main()
