"""Packing is deterministic and whole or absent; the index agrees with its tars; verify names every fault."""

from __future__ import annotations

import gc
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from shardsets import make_set, members, overwrite, picture, rewrite, write_images
from vmamba_dist.config.schema import ConfigError
from vmamba_dist.data import sources
from vmamba_dist.data.decode import DecodeError, decode
from vmamba_dist.data.shards import Offsets, describe, pack, read_index, read_samples, verify
from vmamba_dist.data.sources import Fault, Raw


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def edit(folder: Path, **changes: object) -> None:
    """Change fields of the train split in _info.json."""
    info = json.loads((folder / "_info.json").read_text())
    info["splits"]["train"].update(changes)
    (folder / "_info.json").write_text(json.dumps(info))


def test_the_same_source_gives_the_same_bytes(tmp_path: Path) -> None:
    one, two = make_set(tmp_path / "one"), make_set(tmp_path / "two")
    assert files(one) == files(two)
    other = make_set(tmp_path / "three", seed=1)
    assert files(one).keys() == files(other).keys()
    assert files(one)["odd-train-000000.tar"] != files(other)["odd-train-000000.tar"]


def test_webdataset_and_sizes_agree_with_the_index(tmp_path: Path) -> None:
    folder = make_set(tmp_path)
    index = read_index(folder)
    assert index.lengths == [13] * 7 + [6]
    assert json.loads((folder / "sizes.json").read_text()) == {
        s.filename: s.num_samples for s in index.shards
    }
    urls = [str(folder / shard.filename) for shard in index.shards]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its files to the garbage collector
        read = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
        gc.collect()
    assert len(read) == 97
    assert sorted(int(sample["__key__"]) for sample in read) == list(range(97))
    assert all(int(sample["cls"]) == int(sample["__key__"]) % 5 for sample in read)


def test_every_sample_is_read_from_its_offset(tmp_path: Path) -> None:
    folder = make_set(tmp_path)
    index = read_index(folder)
    source = index.source()
    keys = []
    for shard, length in enumerate(index.lengths):
        for first in range(length):
            alone = read_samples(source, index.offsets, shard, first, 1)
            together = read_samples(source, index.offsets, shard, first, length - first)
            assert alone == together[:1]
            assert isinstance(alone[0], Raw)
            keys.append(int(alone[0].key))
            assert np.asarray(decode(alone[0].image)).shape == np.asarray(picture(keys[-1])).shape
    source.close()
    assert sorted(keys) == list(range(97))


def test_offsets_are_rebuilt_where_the_sidecar_is_missing_or_foreign(tmp_path: Path) -> None:
    folder = make_set(tmp_path)
    sidecar = folder / "_offsets-train.bin"
    index = read_index(folder)
    assert sidecar.stat().st_size == 56 + 4 * (8 + 97 + 8)
    wanted = [index.offsets.bounds(i, 0, n) for i, n in enumerate(index.lengths)]
    content = sidecar.read_bytes()
    for damage in (None, b"", content[:-4], b"X" + content[1:], content[:20] + b"\xff" + content[21:]):
        if damage is None:
            sidecar.unlink()
        else:
            sidecar.write_bytes(damage)
        rebuilt = read_index(folder)
        assert [rebuilt.offsets.bounds(i, 0, n) for i, n in enumerate(rebuilt.lengths)] == wanted
        assert rebuilt.warnings == ()


def test_classes_are_counted_where_an_index_does_not_say_them(tmp_path: Path) -> None:
    """timm's say neither num_classes nor classes, and were refused."""
    folder = make_set(tmp_path)
    whole = read_index(folder)
    info = json.loads((folder / "_info.json").read_text())
    bare = {k: v for k, v in info.items() if k not in ("num_classes", "classes")}
    (folder / "_info.json").write_text(json.dumps(bare))
    assert (whole.num_classes, read_index(folder).num_classes) == (5, 5)
    (folder / "_offsets-train.bin").unlink()
    found = read_index(folder)
    assert (found.num_classes, found.warnings) == (5, ())
    for path in folder.glob("*.tar"):
        rewrite(path, [(m, b"cat" if m.name.endswith(".cls") else d) for m, d in members(path)])
    edit(folder, bytes=[path.stat().st_size for path in sorted(folder.glob("*.tar"))])
    with pytest.raises(ConfigError, match=r'no sample has a label .* add "num_classes": K beside "splits"'):
        read_index(folder)


def test_image_folder_gives_classes_by_name_and_splits_by_folder(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for i, name in enumerate(("zebra", "ape", "yak")):
            write_images(tmp_path / "in" / split / name, 4 + i, 2)
    report = pack(tmp_path / "in", tmp_path / "out", name="zoo")
    assert report.samples == {"train": 15, "val": 15}
    assert len(report.ignored) == 6  # the CSVs
    index = read_index(tmp_path / "out", "auto")
    assert index.split == "val"
    assert index.class_names == ("ape", "yak", "zebra")
    assert verify(tmp_path / "out").ok
    found = {m.name: data for m, data in members(tmp_path / "out/zoo-val-000000.tar")}
    assert found["val_ape_00003.cls"] == b"0"
    assert found["val_zebra_00000.cls"] == b"2"
    assert found["val_yak_00001.png"] == (tmp_path / "in/val/yak/00001.png").read_bytes()


def test_holdout_is_by_id_and_stable_when_images_are_added(tmp_path: Path) -> None:
    def test_keys(count: int) -> set[str]:
        folder = tmp_path / str(count)
        make_set(folder, count, holdout=0.3)
        shards = (folder / "set").glob("odd-test-*.tar")
        return {m.name.split(".")[0] for shard in shards for m, _ in members(shard)}

    few, many = test_keys(60), test_keys(90)
    assert 8 <= len(few) <= 28
    assert few == {key for key in many if int(key) < 60}


def test_csv_with_names_and_splits(tmp_path: Path) -> None:
    write_images(tmp_path, 6, 2)
    (tmp_path / "list.csv").write_text(
        "label,split,path\nred,train,00000.jpg\nblue,val,00001.png\nred,,00002.webp\nblue,train,00003.jpg\n"
    )
    report = pack(tmp_path / "list.csv", tmp_path / "out")
    assert report.samples == {"train": 3, "val": 1}
    assert read_index(tmp_path / "out").class_names == ("blue", "red")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("file,label\na.png,1\n", "needs the columns path and label, has file, label"),
        ("path,label\nnone.png,1\n", "line 2: no file 'none.png'"),
        ("path,label,split\n00000.jpg,1,../x\n", "line 2: split '../x'"),
        ("path,label\n", "has no images"),
    ],
)
def test_csv_mistakes_are_named(tmp_path: Path, text: str, words: str) -> None:
    write_images(tmp_path, 1, 1)
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(ConfigError, match=words):
        pack(tmp_path / "list.csv", tmp_path / "out")


def test_pack_leaves_out_what_has_no_image_header_and_says_so(tmp_path: Path) -> None:
    table = write_images(tmp_path, 9, 3)
    (tmp_path / "00004.png").write_bytes(b"not an image")
    report = pack(table, tmp_path / "out")
    assert report.samples == {"train": 8}
    assert [text.split(":")[0] for text in report.unreadable] == ["00004.png"]
    assert "1 left out (unreadable), first: 00004.png" in str(report)


def test_an_existing_set_stays_unless_told(tmp_path: Path) -> None:
    folder = make_set(tmp_path, 97)
    before = files(folder)
    with pytest.raises(ConfigError, match="has a set of shards already"):
        pack("digits", folder)
    assert files(folder) == before
    pack("digits", folder, overwrite=True)
    assert not list(folder.glob("odd-*"))
    assert read_index(folder).num_samples == 1430
    assert verify(folder).ok


def test_foreign_tars_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/digits-train-000000.tar").write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"holds tars that no _info\.json lists"):
        pack("digits", tmp_path / "out")
    assert (tmp_path / "out/digits-train-000000.tar").read_bytes() == b"mine"


def test_a_killed_pack_leaves_no_set_and_the_next_one_is_whole(tmp_path: Path) -> None:
    code = (
        "import sys; from vmamba_dist.data.shards import pack; print(1, flush=True); "
        "pack('digits', sys.argv[1], samples_per_shard=5)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        process.stdout.readline()
        while not list(tmp_path.glob("out/*.tar")):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    with pytest.raises(ConfigError, match="a pack was interrupted there"):
        read_index(tmp_path / "out")
    for path in (tmp_path / "out").glob("*.tar"):
        assert sources.scan(path).whole
    pack("digits", tmp_path / "out", samples_per_shard=900)
    pack("digits", tmp_path / "fresh", samples_per_shard=900)
    assert files(tmp_path / "out") == files(tmp_path / "fresh")


def test_a_missing_shard_is_an_error(tmp_path: Path) -> None:
    folder = make_set(tmp_path)
    (folder / "odd-train-000003.tar").unlink()
    with pytest.raises(ConfigError, match=r"1 of the 8 shards .* missing, first odd-train-000003\.tar"):
        read_index(folder)


def test_a_longer_shard_is_an_error(tmp_path: Path) -> None:
    folder = make_set(tmp_path)
    path = folder / "odd-train-000003.tar"
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(ConfigError, match=rf"has {size + 512} bytes, its index says {size}"):
        read_index(folder)


def test_another_number_of_samples_is_an_error(tmp_path: Path) -> None:
    folder = make_set(tmp_path)
    edit(folder, shard_lengths=[12] + [13] * 6 + [7])
    with pytest.raises(ConfigError, match=r"000000\.tar holds 13 samples, its index says 12"):
        read_index(folder)
    edit(folder, shard_lengths=[14] + [13] * 6 + [5])
    with pytest.raises(ConfigError, match=r"000000\.tar holds 13 samples, its index says 14"):
        read_index(folder)
    edit(folder, shard_lengths=[13] * 8)
    with pytest.raises(ConfigError, match="says 97 samples, its shard_lengths sum to 104"):
        read_index(folder)


def test_a_whole_tar_with_fewer_samples_is_an_error(tmp_path: Path) -> None:
    folder = make_set(tmp_path)
    path = folder / "odd-train-000001.tar"
    rewrite(path, members(path)[:-2])
    with pytest.raises(ConfigError, match="holds 12 samples, its index says 13"):
        read_index(folder)


def test_a_truncated_shard_is_warned_of_and_the_rest_can_be_read(tmp_path: Path) -> None:
    folder = make_set(tmp_path)
    path = folder / "odd-train-000002.tar"
    size = path.stat().st_size
    bounds = read_index(folder).offsets.bounds(2, 0, 13)
    for keep, good in ((bounds[6] + 700, 6), (bounds[6], 6), (bounds[0] + 100, 0), (0, 0), (bounds[13], 13)):
        os.truncate(path, keep)
        index = read_index(folder)
        assert len(index.warnings) == 1
        assert f"{keep} bytes of {size}" in index.warnings[0]
        read = read_samples(index.source(), index.offsets, 2, 0, 13)
        assert [isinstance(sample, Raw) for sample in read] == [True] * good + [False] * (13 - good)
        path.write_bytes(make_set(tmp_path / f"again{keep}").joinpath(path.name).read_bytes())


def test_a_rewritten_shard_without_a_member_shifts_nothing(tmp_path: Path) -> None:
    """Offsets of the old tar would be wrong for every sample after the missing member."""
    folder = make_set(tmp_path)
    path = folder / "odd-train-000002.tar"
    old = members(path)
    rewrite(path, old[:8] + old[9:])
    index = read_index(folder)
    read = read_samples(index.source(), index.offsets, 2, 0, 13)
    assert read[4] == Fault("no image member (.jpg, .jpeg, .png, .webp)", old[8][0].name.split(".")[0])
    assert sum(isinstance(sample, Raw) for sample in read) == 12


def test_a_missing_label_in_a_tar_of_the_same_size_shifts_nothing(tmp_path: Path) -> None:
    """The end's padding hides the loss, and the old place of the last sample has a header again: that of its label."""
    pack("digits", tmp_path, samples_per_shard=57)
    path = tmp_path / "digits-train-000003.tar"
    old = members(path)
    size = path.stat().st_size
    rewrite(path, old[:21] + old[22:])
    assert path.stat().st_size == size
    index = read_index(tmp_path)
    read = read_samples(index.source(), index.offsets, 3, 0, 57)
    assert [i for i, sample in enumerate(read) if isinstance(sample, Fault)] == [10]


def test_unusable_indices_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.train=.* has no _info\.json \(no set of shards\)"):
        read_index(tmp_path)
    folder = make_set(tmp_path)
    with pytest.raises(ConfigError, match="has no split 'val'; it has train"):
        read_index(folder, "val")
    with pytest.raises(ConfigError, match=r"eval\.data=.* none of val, validation, test"):
        read_index(folder, "auto", key="eval.data")
    info = json.loads((folder / "_info.json").read_text())
    (folder / "_info.json").write_text(json.dumps(info | {"num_classes": -1}))
    with pytest.raises(ConfigError, match="num_classes is -1; leave it out, and the labels are counted"):
        read_index(folder)
    edit(folder, filenames=["../x.tar"] * 8)
    with pytest.raises(ConfigError, match="names files outside its folder"):
        read_index(folder)
    (folder / "_info.json").write_text("{")
    with pytest.raises(ConfigError, match="is not a set's index"):
        read_index(folder)


def test_a_timm_index_without_sizes_and_hashes_works(tmp_path: Path) -> None:
    folder = make_set(tmp_path)
    info = json.loads((folder / "_info.json").read_text())
    for name in ("bytes", "sha256"):
        del info["splits"]["train"][name]
    (folder / "_info.json").write_text(json.dumps(info))
    index = read_index(folder)
    assert index.num_samples == 97
    assert index.mean_bytes > 512
    assert verify(folder).ok


def test_the_fingerprint_is_of_the_content_and_not_of_the_place(tmp_path: Path) -> None:
    folder = make_set(tmp_path)
    before = read_index(folder).fingerprint()
    folder.rename(tmp_path / "elsewhere")
    assert read_index(tmp_path / "elsewhere").fingerprint() == before
    assert read_index(make_set(tmp_path / "other", 96)).fingerprint() != before


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("pipe:cat x.tar", "pipe: addresses run a shell command and are refused"),
        ("s3://bucket/x", "s3: addresses cannot be read here"),
        ("https://host/x", "https: addresses cannot be read here"),
    ],
)
def test_addresses_that_are_not_local_are_refused(address: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_index(address)


def test_pickles_and_odd_labels_are_faults(tmp_path: Path) -> None:
    folder = make_set(tmp_path)
    path = folder / "odd-train-000000.tar"
    old = members(path)
    old[3][0].name = old[3][0].name.replace(".cls", ".pkl")
    for i, label in ((1, b"5"), (5, b"-1"), (7, b"cat"), (9, b"\xff"), (11, b""), (13, b"1e3")):
        old[i] = (old[i][0], label)
    for i, label in ((15, b'{"label": 4}'), (17, b'{"label": "4"}'), (19, b"{"), (21, b'{"label": true}')):
        old[i][0].name = old[i][0].name.replace(".cls", ".json")
        old[i] = (old[i][0], label)
    rewrite(path, old)
    index = read_index(folder)
    read = read_samples(index.source(), index.offsets, 0, 0, 13)
    labels = [s.reason if isinstance(s, Fault) else sources.parse_label(s, 5) for s in read]
    reasons = [label.reason if isinstance(label, Fault) else label for label in labels]
    assert reasons[7] == 4
    assert reasons[:7] == [
        "label 5 is outside 0 … 4",
        "member .pkl may hold pickled code and is refused",
        "label -1 is outside 0 … 4",
        "label 'cat' is not an integer",
        "unreadable label: 'ascii' codec can't decode byte 0xff in position 0: ordinal not in range(128)",
        "label '' is not an integer",
        "label '1e3' is not an integer",
    ]
    assert reasons[8] == "label '4' is not an integer"
    assert str(reasons[9]).startswith("unreadable label")
    assert reasons[10] == "label 'True' is not an integer"


def test_verify_names_every_fault(tmp_path: Path) -> None:
    folder = make_set(tmp_path)
    assert verify(folder).ok
    first = members(folder / "odd-train-000000.tar")
    overwrite(folder / "odd-train-000000.tar", first[4][0].name, b"garbage")
    second = members(folder / "odd-train-000001.tar")
    overwrite(folder / "odd-train-000001.tar", second[5][0].name, b"7")
    rewrite(folder / "odd-train-000002.tar", members(folder / "odd-train-000002.tar")[1:])
    os.truncate(folder / "odd-train-000003.tar", 5000)
    (folder / "odd-train-000004.tar").unlink()
    report = verify(folder)
    assert not report.ok
    faults = {(f.shard[-5], f.index): f.reason for f in report.faults}
    assert "undecodable image" in faults["0", 2]
    assert faults["1", 2] == "label 7 is outside 0 … 4"
    assert faults["2", 0].startswith("no image member")
    assert faults["4", -1] == "missing"
    text = str(report)
    assert text.count("sha256 is") == 4
    assert "000003.tar: the tar breaks off" in text
    assert first[4][0].name.split(".")[0] in text
    assert "000003.tar: 5000 bytes, the index says" in text
    assert {f.shard[-5] for f in report.faults} == set("01234")


def test_verify_warns_where_labels_cluster(tmp_path: Path) -> None:
    for i in range(4):
        write_images(tmp_path / "in" / f"class{i}", 20, 2)
    pack(tmp_path / "in", tmp_path / "sorted", shuffle=False)
    pack(tmp_path / "in", tmp_path / "shuffled")
    assert "neighbours have the same label" in verify(tmp_path / "sorted").warnings[0]
    assert verify(tmp_path / "sorted").ok
    assert verify(tmp_path / "shuffled").warnings == ()


def test_show_says_what_a_set_holds(tmp_path: Path) -> None:
    text = describe(make_set(tmp_path, holdout=0.3))
    assert "odd: 5 classes" in text
    assert "train: " in text
    assert "test: " in text


def encode(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)  # type: ignore[arg-type]
    return file.getvalue()


def test_every_mode_comes_out_as_documented_rgb() -> None:
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    out = np.asarray(decode(encode(grey, "PNG")))
    assert (out == np.asarray(grey)[:, :, None]).all()
    deep = Image.fromarray((np.arange(256, dtype=np.uint16) * 257).reshape(16, 16))
    assert (np.asarray(decode(encode(deep, "PNG"))) == out).all()
    color = picture(3)
    assert (np.asarray(decode(encode(color, "PNG"))) == np.asarray(color)).all()
    palette = color.quantize(16)
    assert (np.asarray(decode(encode(palette, "PNG"))) == np.asarray(palette.convert("RGB"))).all()
    clear = color.convert("RGBA")
    clear.putalpha(0)
    assert (np.asarray(decode(encode(clear, "PNG"))) == 255).all()
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 51))
    assert np.asarray(decode(encode(half, "PNG")))[0, 0].tolist() == [255, 204, 204]
    flat = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    r, g, b = np.asarray(decode(encode(flat, "JPEG")))[4, 4].tolist()
    assert r > 200
    assert max(g, b) < 60
    keyed = Image.new("RGB", (4, 4), (1, 2, 3))
    assert (np.asarray(decode(encode(keyed, "PNG", transparency=(1, 2, 3)))) == 255).all()
    bits = Image.new("1", (4, 4), 1)
    assert (np.asarray(decode(encode(bits, "PNG"))) == 255).all()


def test_exif_orientation_is_applied() -> None:
    image = Image.fromarray(np.kron(np.array([[255, 0, 0]], np.uint8), np.ones((32, 32), np.uint8)))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° clockwise to see it upright
    out = decode(encode(image, "JPEG", exif=exif))
    assert out.size == (32, 96)
    assert np.asarray(out)[16, 16, 0] > 200
    assert np.asarray(out)[80, 16, 0] < 50


def test_what_is_no_image_is_a_decode_error() -> None:
    good = encode(picture(1), "JPEG")
    gif = encode(picture(1), "GIF")
    bomb = bytearray(encode(Image.new("L", (8, 8)), "PNG"))
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    for data in (b"", b"garbage", good[: len(good) // 2], good[:100], gif, bytes(bomb)):
        with pytest.raises(DecodeError):
            decode(data)
    large = bytearray(encode(Image.new("L", (8, 8)), "PNG"))
    large[16:24] = (10_000).to_bytes(4, "big") * 2
    with pytest.raises(DecodeError):
        decode(bytes(large))


def test_a_broken_header_in_the_middle_takes_only_its_sample(tmp_path: Path) -> None:
    folder = make_set(tmp_path)
    path = folder / "odd-train-000000.tar"
    start = read_index(folder).offsets.bounds(0, 5, 1)[0]
    with path.open("r+b") as file:
        file.seek(start + 10)
        file.write(b"\xff" * 200)
    index = read_index(folder)
    read = read_samples(index.source(), index.offsets, 0, 0, 13)
    assert [i for i, sample in enumerate(read) if isinstance(sample, Fault)] == [5]


def test_offsets_hold_the_largest_shards(tmp_path: Path) -> None:
    """32 bits of 512-byte blocks reach 2 TiB."""
    far = (2**32 - 2) * 512
    offsets = Offsets.of([[0, 1024, far], [0, 512]])
    offsets.write(tmp_path / "o.bin", "ab" * 32)
    read = Offsets.read(tmp_path / "o.bin", "ab" * 32)
    assert read is not None
    assert read.bounds(0, 1, 1) == [1024, far]
    assert read.bounds(1, 0, 1) == [0, 512]
    assert Offsets.read(tmp_path / "o.bin", "cd" * 32) is None


def test_tars_with_folders_meta_and_long_names_are_found(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        folder = tarfile.TarInfo("deep")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in (
            "__meta__",
            "deep/a.png",
            "deep/a.cls",
            "deep/" + "b" * 150 + ".png",
            "deep/" + "b" * 150 + ".cls",
        ):
            tar.addfile(tarfile.TarInfo(name))
    found = sources.scan(path)
    assert found.whole
    assert found.keys == ["deep/a", "deep/" + "b" * 150]
    data = path.read_bytes()
    read = sources.samples(
        data[found.bounds[0] : found.bounds[2]], [b - found.bounds[0] for b in found.bounds]
    )
    assert [sample.key for sample in read] == found.keys
