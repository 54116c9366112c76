"""The built-in digits are scikit-learn's, and their split never changes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from vmamba_dist.data.datasets.digits import NUM_CLASSES, digits
from vmamba_dist.data.shards import pack, read_index, share_of, verify


def test_records_are_the_images_of_the_package() -> None:
    images, labels = load_digits(return_X_y=True)
    records = list(digits())
    assert len(records) == len({key for key, _, _ in records}) == 1797
    assert [label for _, _, label in records] == labels.tolist()
    for (_, png, _), pixels in zip(records, images.reshape(-1, 8, 8), strict=True):
        stored = np.asarray(Image.open(io.BytesIO(png)))
        assert stored.dtype == np.uint8
        assert np.array_equal(np.rint(stored / 255 * 16), pixels)


def test_split_is_a_hash_of_the_id() -> None:
    assert share_of("digits-00042") == 0.9407857449259609
    held = [key for key, _, _ in digits() if share_of(key) < 0.2]
    assert len(held) == 367


def test_packed_digits_are_whole(tmp_path: Path) -> None:
    report = pack("digits", tmp_path / "a", samples_per_shard=500)
    assert report.samples == {"train": 1430, "test": 367}
    assert report.num_classes == NUM_CLASSES
    found = verify(tmp_path / "a")
    assert found.ok
    assert not found.warnings
    assert found.samples == 1797
    train, test = read_index(tmp_path / "a"), read_index(tmp_path / "a", "auto")
    assert (train.num_samples, train.num_classes, test.split) == (1430, 10, "test")
    again = pack("digits", tmp_path / "b", samples_per_shard=500)
    assert again.samples == report.samples
    assert (tmp_path / "a/_info.json").read_bytes() == (tmp_path / "b/_info.json").read_bytes()
    info = json.loads((tmp_path / "a/_info.json").read_text())
    assert info["splits"]["train"]["shard_lengths"] == [500, 500, 430]
