"""Small real sets of shards for tests, and ways to damage them."""

from __future__ import annotations

import csv
import io
import os
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from vmamba_dist.data.shards import pack, read_index


def picture(number: int) -> Image.Image:
    """An RGB image of an odd size of its own; its pixels say which one it is."""
    rng = np.random.default_rng(number)
    width, height = 17 + number % 5, 13 + number % 7
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_images(folder: Path, count: int, num_classes: int) -> Path:
    """Write `count` images and a CSV that lists them; returns the CSV."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        name = f"{i:05d}" + (".jpg", ".png", ".webp")[i % 3]
        picture(i).save(folder / name)
        lines.append((name, i % num_classes))
    with (folder / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *lines])
    return folder / "list.csv"


def make_set(
    folder: Path, count: int = 97, num_classes: int = 5, samples_per_shard: int = 13, **options: object
) -> Path:
    """Pack `count` images; returns the set's folder."""
    pack(
        write_images(folder / "images", count, num_classes),
        folder / "set",
        name="odd",
        samples_per_shard=samples_per_shard,
        **options,  # type: ignore[arg-type]
    )
    return folder / "set"


def make_damaged_set(folder: Path) -> Path:
    """A set of 97 with a truncated tar, a missing member, an undecodable image and a label out of range."""
    made = make_set(folder, 97)
    tar = [made / f"odd-train-{i:06d}.tar" for i in range(5)]
    os.truncate(tar[1], read_index(made).offsets.bounds(1, 0, 13)[4] + 300)
    old = members(tar[2])
    rewrite(tar[2], old[:6] + old[7:])
    overwrite(tar[3], members(tar[3])[8][0].name, b"garbage")
    overwrite(tar[4], members(tar[4])[1][0].name, b"9")
    return made


# (shard, index in it) of what make_damaged_set breaks.
BAD_PLACES = {*((1, i) for i in range(4, 13)), (2, 3), (3, 4), (4, 0)}


def members(path: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(path) as tar:
        return [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]


def rewrite(path: Path, changed: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    """Write a tar of these members."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for member, data in changed:
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def overwrite(path: Path, name: str, data: bytes) -> None:
    """Put `data` in the place of a member's content, without moving anything."""
    with tarfile.open(path) as tar:
        member = tar.getmember(name)
    with path.open("r+b") as file:
        file.seek(member.offset_data)
        file.write(data.ljust(member.size, b"\0")[: member.size])
