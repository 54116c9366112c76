"""`vmamba shards fractal` on one core, in CPU time, with what encoding alone costs beside.

Law: before anything is timed, two processes and one write the same set. Images are drawn, encoded and written to
shards by the command's own function, in this process; the encode-only rate is of the same pixels, drawn before.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numba
import numpy as np
import PIL
from PIL import Image
from report import publish, table

from vmamba_dist.data.datasets.fractals import Artist, FractalConfig, fractal
from vmamba_dist.data.encode import encode

CLASSES = 20


def same_for_two_processes(folder: Path) -> None:
    for workers in (1, 2):
        config = FractalConfig(CLASSES, 10, size=64, samples_per_shard=40, workers=workers)
        fractal(folder / str(workers), config)
    for path in sorted((folder / "1").iterdir()):
        if path.read_bytes() != (folder / "2" / path.name).read_bytes():
            raise RuntimeError(f"{path.name} differs between one process and two")


def rates(config: FractalConfig, folder: Path) -> tuple[float, float, float, float]:
    """Images a second of CPU time: (written to shards, drawn alone, encoded alone), and mean bytes."""
    images = config.classes * config.per_class
    begin = time.process_time()
    report = fractal(folder, config, overwrite=True)
    written = images / (time.process_time() - begin)
    artist = Artist(config)
    some = [(label, number) for number in range(max(1, 200 // CLASSES)) for label in range(CLASSES)]
    begin = time.process_time()
    drawn = [artist.draw("train", label, number).copy() for label, number in some]
    draw = len(some) / (time.process_time() - begin)
    begin = time.process_time()
    files = [
        encode(Image.fromarray(pixels).convert("RGB"), config.format, config.quality) for pixels in drawn
    ]
    only = len(some) / (time.process_time() - begin)
    if report.samples["train"] != images:
        raise RuntimeError(str(report))
    return written, draw, only, float(np.mean([len(file) for file in files]))


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--per-class", type=int, default=40, help=f"of {CLASSES} classes (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    given = parser.parse_args()
    kinds = {
        "224 px JPEG": {"size": 224, "points": 50_000, "patch": 3},
        "224 px PNG": {"size": 224, "points": 50_000, "patch": 3, "format": "png"},
        "64 px JPEG": {"size": 64},
        "32 px JPEG": {"size": 32},
    }
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        same_for_two_processes(Path(temporary))
        for name, fields in kinds.items():
            config = FractalConfig(CLASSES, given.per_class, test_per_class=0, workers=1, **fields)  # type: ignore[arg-type]
            found = [rates(config, Path(temporary) / "out") for _ in range(given.rounds)]
            written, draw, only, size = (statistics.median(column) for column in zip(*found, strict=True))
            low, high = min(f[0] for f in found), max(f[0] for f in found)
            rows.append(
                (
                    name,
                    f"{config.num_points:,}",
                    f"{config.patch_side} × {config.patch_side}",
                    f"{written:.0f}",
                    f"{low:.0f} … {high:.0f}",
                    f"{draw:.0f}",
                    f"{only:.0f}",
                    f"{size / 1000:.1f}",
                )
            )
    notes = [
        "",
        f"Images a second of CPU time of one process, median and range of {given.rounds} rounds of "
        f"{CLASSES * given.per_class} images of {CLASSES} classes; the bar is 300 at 224 px as JPEG with 50,000 points "
        "and 3 × 3 patches. Written: the whole command, its search for classes and the shards' sha256 included, "
        "compiled code loaded from numba's cache (compiling costs about 6 s, once a machine). Before, one process and "
        f"two wrote the same bytes. numba {numba.__version__}, numpy {np.__version__}, Pillow {PIL.__version__}.",
    ]
    columns = ("images", "points", "patch", "written", "range", "drawn alone", "encoded alone", "kB an image")
    publish("fractals", "Fractals on one core", [*table(columns, rows), *notes])


if __name__ == "__main__":
    main()
