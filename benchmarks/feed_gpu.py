"""Training on one GPU by decoder: images a second, and the share of the time that the step waits for data.

Law: the training step, the feed and the recipe are a run's own; every decoder reads the same shards, in turn, several
times over. The ceiling is the same step fed with one batch, which lies on the device, again and again. The images are
made on the spot, from a seed: noise with about a photograph's spectrum, the shorter side 256 px, as JPEGs of about
35 KiB.
"""

import argparse
import io
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice, repeat
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

import numpy as np
from PIL import Image
from report import RESULTS, publish, table

from vmamba_dist.config import load
from vmamba_dist.config.schema import Config
from vmamba_dist.core.dist import World, world
from vmamba_dist.core.precision import be_deterministic
from vmamba_dist.data.ahead import ahead_on_device
from vmamba_dist.data.augment import DeviceTransform
from vmamba_dist.data.batch import Batch
from vmamba_dist.data.order import choose_lanes
from vmamba_dist.data.prepare import Decoder
from vmamba_dist.data.shards import Index, pack, read_index
from vmamba_dist.data.stream import TrainStream
from vmamba_dist.models.vmamba import create_model
from vmamba_dist.objectives.classify import Classify
from vmamba_dist.parallel.plan import parallelize
from vmamba_dist.train.ema import Ema
from vmamba_dist.train.feed import Feed
from vmamba_dist.train.progress import Progress

CLASSES = 1000
DECODERS: tuple[Decoder, ...] = ("pil", "torchvision", "gpu")
SHAPES = ((341, 256), (256, 341), (256, 256), (384, 256))  # width, height


@dataclass(frozen=True)
class Pace:
    """What one stretch of steps did."""

    images: float  # a second
    waited: float  # share of the time


def make_image(number: int) -> bytes:
    """Draw noise whose amplitudes fall with the frequency, as a photograph's do, and grain; its JPEG."""
    rng = np.random.default_rng(number)
    width, height = SHAPES[number % len(SHAPES)]
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)
    fall = np.maximum(np.hypot(fx, fy), 1 / width) ** -1.25
    layers = [
        np.fft.irfft2(np.fft.rfft2(rng.standard_normal((height, width))) * fall, (height, width))
        for _ in "abc"
    ]
    light = layers[0] / layers[0].std()
    colour = [0.35 * layer / layer.std() for layer in layers[1:]]
    pixels = np.stack([light, light + colour[0], light + colour[1]], 2) * 52 + 118
    pixels += rng.normal(0, 1.5, pixels.shape)
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=88)
    return file.getvalue()


def make_shards(folder: Path, count: int) -> Index:
    (folder / "images").mkdir()
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        for i, data in enumerate(pool.imap(make_image, range(count), chunksize=16)):
            (folder / "images" / f"{i:06d}.jpg").write_bytes(data)
    lines = ["path,label", *(f"{i:06d}.jpg,{i % CLASSES}" for i in range(count))]
    (folder / "images" / "list.csv").write_text("\n".join(lines))
    pack(folder / "images" / "list.csv", folder / "set", name="noise", samples_per_shard=512)
    return read_index(folder / "set")


class Trainer:
    """The model in its engine, and a run's step."""

    def __init__(self, cfg: Config, place: World) -> None:
        self.cfg, self.place = cfg, place
        backend = "torch" if place.device.type == "cpu" else "auto"
        with torch.device("meta"):
            model = create_model(cfg.model.name, num_classes=CLASSES, scan_backend=backend)
        self.engine = parallelize(
            Classify(model, seed=0),
            parallel=cfg.parallel,
            precision=cfg.precision,
            optim=cfg.optim,
            world=place,
            seed=0,
        )
        self.average = Ema(self.engine, cfg.ema)
        self.steps = 0

    def feed(self, batches: Iterator[Batch]) -> Feed:
        device, augment = self.place.device, self.cfg.augment
        transform = DeviceTransform(augment, CLASSES, self.cfg.objective.label_smoothing, seed=0)
        return Feed(batches, transform, device, Progress(device), accumulate=1, on_bad=refuse)

    def train(self, feed: Feed, steps: int) -> Pace:
        """Train; the host is at most a step ahead of the device, as in a run."""
        self.synchronize()
        feed.tally()
        begin, before = time.perf_counter(), None
        for inputs in islice(feed, steps):
            with self.engine.microbatch(sync=True):
                terms = self.engine(inputs)
                self.engine.backward(terms.total)
            self.engine.update(self.cfg.optim.clip)
            self.steps += 1
            self.average.update(self.steps)
            if before is not None:
                before.item()
            before = terms.total.detach()
        self.synchronize()
        seconds = time.perf_counter() - begin
        return Pace(steps * self.cfg.data.global_batch / seconds, feed.tally()[0] / seconds)

    def synchronize(self) -> None:
        if self.place.device.type == "cuda":
            torch.cuda.synchronize()


def refuse(bad: Sequence[object]) -> None:
    raise RuntimeError(f"bad samples among images that were made here: {bad}")


def decoded(
    index: Index, cfg: Config, decoder: Decoder, workers: int, device: torch.device, closing: ExitStack
) -> Iterator[Batch]:
    """The stream of a run with this decoder, from an epoch's beginning."""
    words = {"image_size": cfg.data.image_size, "global_batch": cfg.data.global_batch}
    data = type(cfg.data)(**words, workers=workers, decoder=decoder)
    lanes = choose_lanes(
        index.num_samples, index.mean_bytes, block=data.block, shuffle_gib=data.shuffle_gib, workers=workers
    )
    stream = TrainStream(index, data, cfg.augment, seed=0, lanes=lanes, pin_memory=device.type == "cuda")
    closing.callback(stream.close)
    batches = stream.batches()
    if device.type != "cuda" and decoder != "gpu":
        return batches
    ahead = ahead_on_device(stream, batches, data, cfg.augment.interpolation, device)
    closing.callback(ahead.close)
    return ahead


def feed_alone(batches: Iterator[Batch], trainer: Trainer, count: int) -> float:
    """Images a second of the feed when nothing else is to be done, mixed and normalised on the device."""
    feed = trainer.feed(batches)
    list(islice(feed, max(2, count // 4)))
    trainer.synchronize()
    begin = time.perf_counter()
    for _ in islice(feed, count):
        pass
    trainer.synchronize()
    return count * trainer.cfg.data.global_batch / (time.perf_counter() - begin)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("words", nargs="*", help="key=value, for example parallel.compile=block")
    parser.add_argument("--decoders", nargs="+", choices=DECODERS, default=DECODERS)
    parser.add_argument("--batch", type=int, default=128, help="(default %(default)s)")
    parser.add_argument(
        "--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="(default: cores - 1)"
    )
    parser.add_argument("--images", type=int, default=4096, help="in the shards (default %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="timed, a stretch (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="over all decoders (default %(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the table there too")
    # On a CPU, figures mean nothing.
    parser.add_argument("--rehearse", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not (torch.cuda.is_available() or args.rehearse):
        sys.exit("feed_gpu.py needs a CUDA device; there is none here")
    name, side = "vmamba_tiny_s1l8", 224
    if args.rehearse:
        name, side, args.batch, args.images, args.steps, args.workers = "vmamba_atto", 32, 8, 96, 4, 2
    cfg = load(
        [f"model.name={name}", f"data.global_batch={args.batch}", f"data.image_size={side}", *args.words]
    )
    be_deterministic()
    cells: dict[str, list[tuple[float, Pace]]] = {decoder: [] for decoder in args.decoders}
    ceilings = []
    with tempfile.TemporaryDirectory() as folder, world("cpu" if args.rehearse else "cuda") as place:
        begin = time.perf_counter()
        index = make_shards(Path(folder), args.images)
        say(f"{args.images} images made in {time.perf_counter() - begin:.1f} s")
        trainer = Trainer(cfg, place)
        with ExitStack() as closing:
            batch = next(decoded(index, cfg, "pil", 0, place.device, closing))
        one = trainer.feed(repeat(batch))
        trainer.train(one, max(4, args.steps // 4))
        say("the model is warm")

        def measure(decoder: Decoder, action: Callable[[Iterator[Batch]], float | Pace]) -> float | Pace:
            with ExitStack() as closing:
                return action(decoded(index, cfg, decoder, args.workers, place.device, closing))

        def trained(batches: Iterator[Batch]) -> Pace:
            feed = trainer.feed(batches)
            trainer.train(feed, max(4, args.steps // 4))  # the workers fill their rings
            return trainer.train(feed, args.steps)

        for _ in range(args.rounds):
            ceilings.append(trainer.train(one, args.steps).images)
            for decoder in args.decoders:
                alone = measure(decoder, lambda batches: feed_alone(batches, trainer, args.steps))
                pace = measure(decoder, trained)
                assert isinstance(alone, float)
                assert isinstance(pace, Pace)
                cells[decoder].append((alone, pace))
                say(
                    f"{decoder}: alone {alone:.0f}, training {pace.images:.0f} images/s, waited {pace.waited:.2%}"
                )
    ceiling = statistics.median(ceilings)
    rows = [("one batch again and again", "", f"{ceiling:.0f}", "", "")]
    for decoder, found in cells.items():
        speed = statistics.median(pace.images for _, pace in found)
        rows.append(
            (
                f"`data.decoder={decoder}`",
                f"{statistics.median(alone for alone, _ in found):.0f}",
                f"{speed:.0f}",
                f"{statistics.median(pace.waited for _, pace in found):.2%}",
                f"{speed / ceiling:.1%}",
            )
        )
    columns = ("feed", "feed alone, images/s", "training, images/s", "data wait", "of the ceiling")
    engine = " ".join(args.words) or "eager"
    body = [
        f"{name} at {side} px, {args.batch} samples a step, {cfg.precision.compute}, {engine}. A step is forward, "
        f"backward, clipping, AdamW, average. {args.workers} readers beside the training process, {os.cpu_count()} "
        f"cores. {index.num_samples} JPEGs of {index.mean_bytes / 1024:.0f} KiB, shorter side 256 px, read from the "
        "page cache; the full recipe (crop, flip, RandAugment, erasing, mixing). Medians of "
        f"{args.rounds} rounds over all rows, {args.steps} steps each. Data wait: the share of the time that the loop "
        "stood in the feed. Feed alone: nothing else to do.",
        "",
        *table(columns, rows),
    ]
    kind = "compiled" if cfg.parallel.compile == "block" else "eager"
    folders = [*([] if args.rehearse else [RESULTS]), *([args.out] if args.out else [])]
    publish(f"feed_{kind}_gpu", "Training by decoder: images a second and data wait", body, folders)


if __name__ == "__main__":
    main()
