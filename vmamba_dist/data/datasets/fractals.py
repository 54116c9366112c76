"""Images from formulas: iterated function systems, as many classes and images as one likes, with labels.

Law: an image is a function of (seed, split, class, number) and of the settings, bit for bit, on any machine and
for any number of processes; a class is a function of (seed, class) alone, whatever the size, so that more images,
more classes or larger ones leave what was there as it was. The arithmetic is IEEE double with + and × alone.

A class is a random system of 2 … 8 affine maps, each chosen with a probability as its area is, kept where the
points of its orbit fill at least a fifth of the canvas. An image of it has one of the six coefficients of all
maps scaled by .8 … 1.2, is turned and mirrored at random, and stamps a random 3 × 3 pattern of greys at every
point. Source: Kataoka et al., "Pre-training without Natural Images" (FractalDB), ACCV 2020; the code is our own.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image

from vmamba_dist.config.schema import ConfigError
from vmamba_dist.data.encode import FORMATS, Format, encode
from vmamba_dist.data.pack import PackReport, report, shuffled
from vmamba_dist.data.sources import Fault, local_path
from vmamba_dist.data.writer import Plan, Progress, Sample, ShardRecord, check_limits, write_set

MAX_MAPS = 8
FILLING = 0.2  # of the canvas, by single points: FractalDB's
SEARCH_SIDE = 128  # px of the canvas on which classes are searched, one point a pixel
WEIGHT = 0.2  # how far a coefficient is scaled from 1
SMALL = 96  # px; below, a point is one pixel, since 3 × 3 of them would hide the shape

_GOLDEN = 0x9E3779B97F4A7C15
_WORD = 1 << 64


@dataclass(frozen=True)
class FractalConfig:
    """What to draw."""

    classes: int  # number of classes
    per_class: int  # training images a class
    test_per_class: int = -1  # test images a class; -1: a tenth of per_class, rounded up
    size: int = 224  # px
    seed: int = 0
    points: int = 0  # points of an image; 0: one a pixel, and 4,096 at least
    patch: int = 0  # px of the pattern that a point stamps; 0: 3, and 1 where size < 96
    format: Format = "jpg"  # jpg | png | webp
    quality: int = 90  # of JPEG and WebP
    samples_per_shard: int = 0  # 0: by shard_mib
    shard_mib: float = 32.0  # small enough for several processes to share a small set
    workers: int = 0  # processes; 0: one a core for large sets
    name: str = "fractal"  # the shards' first name

    def __post_init__(self) -> None:
        for key, low, high in (
            ("classes", 2, 1_000_000),
            ("per_class", 1, 10_000_000),
            ("test_per_class", -1, 10_000_000),
            ("size", 8, 4096),
            ("seed", 0, 2**63 - 1),
            ("points", 0, 100_000_000),
            ("patch", 0, 7),
            ("quality", 1, 100),
            ("samples_per_shard", 0, 10_000_000),
            ("workers", 0, 4096),
        ):
            value = getattr(self, key)
            if not low <= value <= high:
                raise ConfigError(f"{key}={value}: use {low} … {high}")
        if self.format not in FORMATS:
            raise ConfigError(f"format={self.format!r}: use {', '.join(FORMATS)}")
        if not self.name.replace("-", "").replace("_", "").isalnum() or not self.name.isascii():
            raise ConfigError(f"name={self.name!r}: use letters, digits, - and _")

    @property
    def num_points(self) -> int:
        return self.points or max(self.size**2, 4096)

    @property
    def patch_side(self) -> int:
        return self.patch or (1 if self.size < SMALL else 3)

    @property
    def num_test(self) -> int:
        return -(-self.per_class // 10) if self.test_per_class < 0 else self.test_per_class


def read_words(words: Sequence[str]) -> FractalConfig:
    """Read key=value words. Raises ConfigError naming the key, the value and the fix."""
    fields = {field.name: field for field in dataclasses.fields(FractalConfig)}
    values: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"{word!r} is not key=value; write for example classes=100 per_class=1000")
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(fields)}"
            raise ConfigError(f"{word}: unknown key; {hint}")
        kind = {"int": int, "float": float}.get(str(fields[key].type), str)
        try:
            values[key] = kind(text)
        except ValueError as error:
            raise ConfigError(f"{word}: give {'a whole' if kind is int else 'a'} number") from error
    missing = [key for key in ("classes", "per_class") if key not in values]
    if missing:
        raise ConfigError(f"{missing[0]} is not set; write for example classes=100 per_class=1000")
    return FractalConfig(**values)


def fractal(
    out: str | Path, config: FractalConfig, *, overwrite: bool = False, progress: Progress | None = None
) -> PackReport:
    """Draw a set of shards at `out`, with the splits train and test; a start after a kill goes on.

    The test split does not depend on per_class. Raises ConfigError where `out` has a set already and overwrite is
    not given.
    """
    shard_bytes = check_limits(config.samples_per_shard or None, config.shard_mib, config.workers or None)
    artist = Artist(config)
    num_train = config.classes * config.per_class
    num_test = config.classes * config.num_test
    splits = {"train": shuffled(range(num_train), config.seed)}
    if num_test:
        splits["test"] = shuffled(range(num_train, num_train + num_test), config.seed)

    def make(number: int) -> Sample | Fault:
        split, within = ("train", number) if number < num_train else ("test", number - num_train)
        label, instance = within % config.classes, within // config.classes
        return Sample(
            f"{split}-{label:06d}-{instance:07d}", config.format, artist.file(split, label, instance), label
        )

    looks = {"per_class", "samples_per_shard", "shard_mib", "workers", "name", "test_per_class"}
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in looks}
    plan = Plan(
        name=config.name,
        splits=splits,
        weights=np.ones(num_train + num_test),
        make=make,
        digest=json.dumps(["fractal 1", settings, PIL.__version__]),
        samples_per_shard=config.samples_per_shard or None,
        shard_bytes=shard_bytes,
    )

    def extra(records: Sequence[ShardRecord]) -> dict[str, Any]:
        return {
            "num_classes": config.classes,
            "classes": [f"fractal-{label}" for label in range(config.classes)],
            "shuffled": True,
            "seed": config.seed,
            "fractal": {**settings, "points": config.num_points, "patch": config.patch_side},
        }

    records = write_set(
        local_path(str(out)),
        plan,
        extra,
        workers=config.workers or None,
        overwrite=overwrite,
        progress=progress,
    )
    return report(local_path(str(out)), plan, records, num_classes=config.classes)


class Artist:
    """Draws the images of one configuration; finding its classes costs about 3 ms each."""

    def __init__(self, config: FractalConfig) -> None:
        self._config = config
        self._systems = [_find(_state(config.seed, 1, label)) for label in range(config.classes)]
        self._xy = np.empty((2, config.num_points))
        self._canvas = np.empty((config.size, config.size), np.uint8)

    def draw(self, split: str, label: int, instance: int) -> NDArray[np.uint8]:
        """Draw one image, (size, size) greys; the memory is used again by the next one."""
        maps, chance = self._systems[label]
        state = _state(self._config.seed, 2 if split == "train" else 3, label, instance)
        _instance(maps, chance, state, self._xy, self._config.patch_side, self._canvas)
        return self._canvas

    def file(self, split: str, label: int, instance: int) -> bytes:
        """Draw and encode one image, as RGB: a training run decodes three channels of real images too."""
        image = Image.fromarray(self.draw(split, label, instance)).convert("RGB")
        return encode(image, self._config.format, self._config.quality)


def _state(*words: int) -> NDArray[np.uint64]:
    """Hash whole numbers to the state of a generator."""
    state = 0
    for word in words:
        state = _mix((state + word + 1) * _GOLDEN % _WORD)
    return np.array([state], dtype=np.uint64)


def _mix(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % _WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % _WORD
    return z ^ (z >> 31)


# cache: compiling takes seconds, and every process of a study would wait for it.
_compiled = numba.njit(cache=True, fastmath=False)


@_compiled
def _next(state: NDArray[np.uint64]) -> Any:
    """SplitMix64 (Steele et al., 2014): the next 64 bits."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    z = state[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@_compiled
def _uniform(state: NDArray[np.uint64]) -> float:
    """A number in [0, 1), of 53 bits."""
    return np.float64(_next(state) >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@_compiled
def _below(state: NDArray[np.uint64], count: int) -> int:
    return int(_uniform(state) * count)


@_compiled
def _find(state: NDArray[np.uint64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Draw systems until one fills its canvas: maps (N, 6) and their cumulated probabilities (N,)."""
    xy = np.empty((2, SEARCH_SIDE * SEARCH_SIDE))
    canvas = np.empty((SEARCH_SIDE, SEARCH_SIDE), np.uint8)
    point = np.full((1, 1), 255, np.uint8)
    while True:
        count = 2 + _below(state, MAX_MAPS - 1)
        maps = np.empty((count, 6))
        area = np.empty(count)
        for i in range(count):
            for j in range(6):
                maps[i, j] = 2.0 * _uniform(state) - 1.0
            area[i] = abs(maps[i, 0] * maps[i, 3] - maps[i, 1] * maps[i, 2])
        chance = np.cumsum(area / area.sum())
        if _stamp(maps, chance, state, xy, point, canvas) >= FILLING * canvas.size:
            return maps, chance


@_compiled
def _instance(
    maps: NDArray[np.float64],
    chance: NDArray[np.float64],
    state: NDArray[np.uint64],
    xy: NDArray[np.float64],
    side: int,
    canvas: NDArray[np.uint8],
) -> None:
    """Draw one image of a class. A scaled system whose orbit leaves or shrinks to a spot is drawn anew."""
    patch = np.zeros((side, side), np.uint8)
    own = np.empty_like(maps)
    for attempt in range(16):
        own[:] = maps
        if attempt < 15:
            own[:, _below(state, 6)] *= 1.0 - WEIGHT + 2.0 * WEIGHT * _uniform(state)
        _turn(own, _below(state, 8))
        for i in range(side):
            for j in range(side):
                patch[i, j] = 64 + _below(state, 192) if side == 1 or _uniform(state) < 0.5 else 0
        if not patch.any():
            patch[side // 2, side // 2] = 255
        if _stamp(own, chance, state, xy, patch, canvas) >= 0.25 * FILLING * canvas.size:
            return


@_compiled
def _turn(maps: NDArray[np.float64], symmetry: int) -> None:
    """Turn and mirror what a system draws: 8 symmetries of the square, by exchange and sign alone."""
    for m in maps:
        if symmetry & 1:  # x for y
            m[0], m[1], m[2], m[3], m[4], m[5] = m[3], m[2], m[1], m[0], m[5], m[4]
        if symmetry & 2:  # -x
            m[1], m[2], m[4] = -m[1], -m[2], -m[4]
        if symmetry & 4:  # -y
            m[1], m[2], m[5] = -m[1], -m[2], -m[5]


@_compiled
def _stamp(
    maps: NDArray[np.float64],
    chance: NDArray[np.float64],
    state: NDArray[np.uint64],
    xy: NDArray[np.float64],
    patch: NDArray[np.uint8],
    canvas: NDArray[np.uint8],
) -> int:
    """Follow an orbit, fit it into the canvas, stamp the patch at each point; returns how many pixels are lit."""
    last = maps.shape[0] - 1
    num_points = xy.shape[1]
    x, y = 0.0, 0.0
    left, right, low, high = np.inf, -np.inf, np.inf, -np.inf
    for i in range(-20, num_points):  # the first twenty are on their way to the attractor
        pick = _uniform(state)
        k = 0
        while k < last and pick >= chance[k]:
            k += 1
        x, y = maps[k, 0] * x + maps[k, 1] * y + maps[k, 4], maps[k, 2] * x + maps[k, 3] * y + maps[k, 5]
        if i >= 0:
            xy[0, i], xy[1, i] = x, y
            left, right, low, high = min(left, x), max(right, x), min(low, y), max(high, y)
    canvas[:] = 0
    width, height = right - left, high - low
    if not (1e-6 < width < 1e6 and 1e-6 < height < 1e6):  # not a number included
        return 0
    side = patch.shape[0]
    across = (canvas.shape[1] - side) / width
    down = (canvas.shape[0] - side) / height
    for i in range(num_points):
        column = int((xy[0, i] - left) * across)
        row = int((xy[1, i] - low) * down)
        for a in range(side):
            for b in range(side):
                if patch[a, b]:
                    canvas[row + a, column + b] = patch[a, b]
    lit = 0
    for pixel in canvas.flat:
        lit += int(pixel > 0)
    return lit
