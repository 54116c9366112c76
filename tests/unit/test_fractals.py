"""A fractal is a function of (seed, split, class, number): the same in every set, for any number of processes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from shardsets import members
from vmamba_dist.config.schema import ConfigError
from vmamba_dist.data import command
from vmamba_dist.data.datasets.fractals import (
    FILLING,
    SEARCH_SIDE,
    Artist,
    FractalConfig,
    _find,
    _next,
    _stamp,
    _state,
    _turn,
    fractal,
    read_words,
)
from vmamba_dist.data.shards import read_index, verify

SMALL = {"classes": 5, "per_class": 12, "size": 16, "samples_per_shard": 9}


def make(folder: Path, **changes: object) -> dict[str, bytes]:
    fractal(folder, FractalConfig(**{**SMALL, **changes}))  # type: ignore[arg-type]
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def contents(folder: Path, split: str = "train") -> dict[str, bytes]:
    tars = sorted(folder.glob(f"*-{split}-*.tar"))
    return {member.name: data for tar in tars for member, data in members(tar)}


@pytest.mark.parametrize("workers", [2, 3])
def test_the_same_set_for_any_number_of_processes(tmp_path: Path, workers: int) -> None:
    assert make(tmp_path / "one", workers=1) == make(tmp_path / "many", workers=workers)


def test_a_set_is_whole_balanced_and_shuffled(tmp_path: Path) -> None:
    make(tmp_path, workers=1)
    report = verify(tmp_path)
    assert report.ok
    assert report.warnings == ()
    train, test = read_index(tmp_path), read_index(tmp_path, "auto")
    assert (train.num_samples, test.num_samples, train.num_classes) == (60, 10, 5)
    labels = [data for name, data in contents(tmp_path).items() if name.endswith(".cls")]
    assert sorted(labels) == sorted(str(label).encode() for label in range(5) for _ in range(12))
    assert json.loads((tmp_path / "_info.json").read_text())["fractal"]["points"] == 4096


def test_more_images_or_classes_leave_the_others_as_they_were(tmp_path: Path) -> None:
    make(tmp_path / "few")
    few, few_test = contents(tmp_path / "few"), contents(tmp_path / "few", "test")
    make(tmp_path / "more", per_class=20)
    make(tmp_path / "wide", classes=7)
    assert few.items() <= contents(tmp_path / "more").items()
    assert few.items() <= contents(tmp_path / "wide").items()
    assert few_test.items() == contents(tmp_path / "more", "test").items()
    make(tmp_path / "other", seed=1)
    assert (
        not few.items() & {k: v for k, v in contents(tmp_path / "other").items() if k[-3:] == "jpg"}.items()
    )


def test_pixels_are_the_same_on_every_machine() -> None:
    """These hashes change only when every set that was ever made changes."""
    said = hashlib.sha256()
    for size in (16, 40, 224):
        artist = Artist(FractalConfig(classes=3, per_class=1, size=size))
        for label in range(3):
            said.update(artist.draw("train", label, 5).tobytes() + artist.draw("test", label, 5).tobytes())
    assert said.hexdigest() == "b215f1a7c1912ba9ac5c7bb33d0cd5d87729cdb0d126fce83bfd6ce214f8f764"


def test_compiled_equals_interpreted() -> None:
    maps, chance = _find(_state(3, 1, 4))
    patch = np.array([[0, 90, 0], [255, 0, 70], [0, 0, 130]], np.uint8)
    drawn = []
    for stamp in (_stamp, _stamp.py_func):
        canvas = np.full((31, 31), 7, np.uint8)
        lit = stamp(maps, chance, _state(9), np.empty((2, 2000)), patch, canvas)
        assert lit == np.count_nonzero(canvas) > 31
        drawn.append(canvas)
    assert (drawn[0] == drawn[1]).all()


def test_the_generator_is_splitmix() -> None:
    """The first words for the seed 1234567, as published with the algorithm."""
    state = np.array([1234567], np.uint64)
    assert [int(_next(state)) for _ in range(3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@pytest.mark.parametrize("symmetry", range(8))
def test_turned_maps_draw_the_turned_image(symmetry: int) -> None:
    """T'(R p) = R T(p) for the symmetry R."""
    rng = np.random.default_rng(symmetry)
    maps = rng.uniform(-1, 1, (4, 6))
    swap = np.array([[0, 1], [1, 0]]) if symmetry & 1 else np.eye(2)
    turn = np.diag([-1 if symmetry & 2 else 1, -1 if symmetry & 4 else 1]) @ swap
    turned = maps.copy()
    _turn(turned, symmetry)
    point = rng.uniform(-1, 1, 2)
    for m, t in zip(maps, turned, strict=True):
        there = m[:4].reshape(2, 2) @ point + m[4:]
        assert np.allclose(t[:4].reshape(2, 2) @ (turn @ point) + t[4:], turn @ there, rtol=0, atol=1e-15)


def test_every_class_fills_its_canvas() -> None:
    for label in range(20):
        maps, chance = _find(_state(0, 1, label))
        assert 2 <= len(maps) <= 8
        assert np.abs(maps).max() <= 1
        canvas = np.empty((SEARCH_SIDE, SEARCH_SIDE), np.uint8)
        point = np.full((1, 1), 1, np.uint8)
        xy = np.empty((2, SEARCH_SIDE**2))
        assert _stamp(maps, chance, _state(77), xy, point, canvas) > 0.9 * FILLING * canvas.size


def test_labels_can_be_told_from_pixels() -> None:
    """The nearest training image, among all, has the test image's class far more often than by chance."""
    artist = Artist(FractalConfig(classes=10, per_class=40, size=32))

    def looks(split: str, count: int) -> np.ndarray:
        shapes = np.array([[artist.draw(split, c, i) > 0 for i in range(count)] for c in range(10)], float)
        return shapes.reshape(10 * count, -1)

    train, test = looks("train", 40), looks("test", 8)
    distance = (train**2).sum(1) - 2 * test @ train.T
    found = distance.argmin(1) // 40
    assert (found == np.repeat(np.arange(10), 8)).mean() > 0.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["class=3"], "class=3: unknown key; did you mean classes"),
        (["classes=3"], "per_class is not set"),
        (["classes=3", "per_class=many"], "per_class=many: give a whole number"),
        (["classes"], "'classes' is not key=value"),
        (["classes=1", "per_class=3"], "classes=1: use 2 … 1000000"),
        (["classes=3", "per_class=3", "size=4"], "size=4: use 8 … 4096"),
        (["classes=3", "per_class=3", "format=gif"], "format='gif': use jpg, png, webp"),
        (["classes=3", "per_class=3", "name=../x"], "name='../x': use letters"),
        (["classes=3", "per_class=3", "shard_mib=nan"], "shard_mib=nan: use more than 0 MiB"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        command.main(["fractal", str(tmp_path / "out"), *words])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("said", "folder"), [(["named"], "named"), (["out=named"], "named"), ([], "data/fractals")]
)
def test_the_folder_may_be_said_in_either_style_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str], folder: str
) -> None:
    """`classes=2 per_class=1` alone was wrong: classes=2 was taken for the folder, and said to be unset."""
    monkeypatch.chdir(tmp_path)
    words = ["classes=2", "per_class=1", "size=16", "test_per_class=0", "workers=1"]
    for sentence in ([*said, *words], [*words, *said, "--overwrite"]):
        assert command.main(["fractal", *sentence]) == 0
        assert read_index(tmp_path / folder).num_samples == 2


def test_a_folder_without_a_name_is_named() -> None:
    with pytest.raises(ConfigError, match="out= names no folder"):
        command.main(["fractal", "classes=2", "out="])


def test_the_command_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["classes=3", "per_class=4", "size=16", "format=png", "test_per_class=0", "workers=1"]
    assert command.main(["fractal", str(tmp_path / "out"), *words]) == 0
    assert "train 12; 3 classes, 1 shards" in capsys.readouterr().out
    assert read_index(tmp_path / "out").num_samples == 12
    assert read_words(words).num_test == 0
