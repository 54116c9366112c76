"""A pack is a function of its source: for any number of processes, after any kill, and from any form of list."""

from __future__ import annotations

import csv
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from shardsets import make_set, members, picture, rewrite, write_images
from vmamba_dist.config.schema import ConfigError, UserError
from vmamba_dist.data import command
from vmamba_dist.data.decode import decode
from vmamba_dist.data.shards import pack, read_index, verify

SAVED = Path(__file__).parents[1] / "golden" / "hf_saved"  # DatasetDict.save_to_disk of datasets 5.2.0


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def samples(folder: Path, split: str = "train") -> dict[str, tuple[bytes, bytes]]:
    """(image, label) by key."""
    found: dict[str, dict[str, bytes]] = {}
    for tar in sorted(folder.glob(f"*-{split}-*.tar")):
        for member, data in members(tar):
            key, suffix = member.name.split(".")
            found.setdefault(key, {})["label" if suffix == "cls" else "image"] = data
    return {key: (parts["image"], parts["label"]) for key, parts in found.items()}


def test_the_same_bytes_for_any_number_of_processes(tmp_path: Path) -> None:
    table = write_images(tmp_path, 61, 5)
    (tmp_path / "00007.png").write_bytes(b"no image")
    wanted = None
    for workers in (1, 2, 3):
        report = pack(table, tmp_path / str(workers), samples_per_shard=7, workers=workers, max_side=16)
        assert report.samples == {"train": 60}
        assert report.unreadable[0].startswith("00007.png: undecodable image")
        assert "00007.png" in (tmp_path / str(workers) / "left_out.txt").read_text()
        wanted = wanted or files(tmp_path / str(workers))
        assert files(tmp_path / str(workers)) == wanted
        assert not (tmp_path / str(workers) / "_packing").exists()


KILLED = """
import os, signal, sys, time
from pathlib import Path
from vmamba_dist.data.shards import pack

out, done = Path(sys.argv[1]), []
for finished in (2, 5, 9):
    child = os.fork()
    if not child:
        pack("digits", out, samples_per_shard=60, workers=int(sys.argv[2]))
        os._exit(0)
    records = lambda: sorted(out.glob("_packing/*.tar.json"))
    while len(records()) < finished and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    time.sleep(0.2)  # its workers go with it
    kept = {p.name: p.stat().st_mtime_ns for p in out.glob("*.tar") if (out / "_packing" / f"{p.name}.json").exists()}
    assert not (out / "_info.json").exists(), "the pack ended before it was killed"
    assert all(kept[name] == when for name, when in done), "a finished shard was written again"
    assert len(kept) >= finished
    done = list(kept.items())
pack("digits", out, samples_per_shard=60, workers=int(sys.argv[2]))
assert all((out / name).stat().st_mtime_ns == when for name, when in done)
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_pack_goes_on_and_ends_in_the_same_bytes(tmp_path: Path, workers: int) -> None:
    subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "out"), str(workers)], check=True, timeout=120
    )
    pack("digits", tmp_path / "whole", samples_per_shard=60, workers=1)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def interrupted(folder: Path, table: Path, **options: object) -> Path:
    """A pack that was stopped after its second shard."""

    def progress(done: int, of: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(table, folder, workers=1, progress=progress, **options)  # type: ignore[arg-type]
    return folder


def test_another_source_or_option_begins_anew(tmp_path: Path) -> None:
    table = write_images(tmp_path / "in", 30, 3)
    for i, change in enumerate(({"seed": 1}, {"max_side": 14}, {"samples_per_shard": 5}, {"name": "x"})):
        out = interrupted(tmp_path / f"out{i}", table, samples_per_shard=4)
        options: dict[str, object] = {"samples_per_shard": 4, **change}
        pack(table, out, **options)  # type: ignore[arg-type]
        pack(table, tmp_path / f"whole{i}", **options)  # type: ignore[arg-type]
        assert files(out) == files(tmp_path / f"whole{i}")
    out = interrupted(tmp_path / "out", table, samples_per_shard=4)
    picture(99).save(tmp_path / "in/00000.jpg")
    pack(table, out, samples_per_shard=4)
    assert samples(out)["00000"][0] == (tmp_path / "in/00000.jpg").read_bytes()


def test_an_interrupted_overwrite_goes_on_without_being_told(tmp_path: Path) -> None:
    table = write_images(tmp_path / "in", 30, 3)
    pack(table, tmp_path / "out", samples_per_shard=3)
    interrupted(tmp_path / "out", table, samples_per_shard=4, overwrite=True)
    with pytest.raises(ConfigError, match="a pack was interrupted there"):
        read_index(tmp_path / "out")
    kept = (tmp_path / "out/list-train-000000.tar").stat().st_mtime_ns
    pack(table, tmp_path / "out", samples_per_shard=4)
    pack(table, tmp_path / "whole", samples_per_shard=4)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert (tmp_path / "out/list-train-000000.tar").stat().st_mtime_ns == kept


def test_two_packs_in_one_folder_are_refused(tmp_path: Path) -> None:
    table = write_images(tmp_path / "in", 30, 3)

    def second(done: int, of: int) -> None:
        if done == 1:
            with pytest.raises(ConfigError, match="another process writes a set there"):
                pack(table, tmp_path / "out", samples_per_shard=4)

    pack(table, tmp_path / "out", samples_per_shard=4, workers=1, progress=second)
    assert verify(tmp_path / "out").ok


def test_a_worker_that_dies_is_an_error_and_the_rest_is_kept(tmp_path: Path) -> None:
    code = (
        "import os, sys; from vmamba_dist.data import pack as p; old = p.convert; parent = os.getpid()\n"
        "def dies(data, **options):\n"
        "    if os.getpid() != parent and len(data) == int(sys.argv[3]): os._exit(7)\n"
        "    return old(data, **options)\n"
        "p.convert = dies; p.pack(sys.argv[1], sys.argv[2], samples_per_shard=5, workers=2)"
    )
    table = write_images(tmp_path / "in", 30, 3)
    size = str((tmp_path / "in/00000.jpg").stat().st_size)
    ended = subprocess.run(
        [sys.executable, "-c", code, str(table), str(tmp_path / "out"), size],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 1
    assert "ended with exit code 7" in ended.stderr
    pack(table, tmp_path / "out", samples_per_shard=5)
    assert verify(tmp_path / "out").samples == 30


def test_shards_close_at_about_their_size(tmp_path: Path) -> None:
    table = write_images(tmp_path / "in", 120, 3)
    for options in ({}, {"encode": "png"}, {"encode": "jpg", "quality": 50}):
        pack(table, tmp_path / "out", shard_mib=1 / 16, overwrite=True, **options)  # type: ignore[arg-type]
        sizes = [shard.num_bytes or 0 for shard in read_index(tmp_path / "out").shards]
        assert len(sizes) > 2
        assert all(65_536 * 0.8 < size < 65_536 * 1.3 for size in sizes[:-1]), sizes


def test_a_parquet_list_is_a_csv_list(tmp_path: Path) -> None:
    table = write_images(tmp_path, 30, 3)
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = {"path": [row["path"] for row in rows], "label": [int(row["label"]) for row in rows]}
    pq.write_table(pa.table(columns), tmp_path / "list.parquet")
    pack(table, tmp_path / "a", samples_per_shard=8)
    pack(tmp_path / "list.parquet", tmp_path / "b", samples_per_shard=8)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    named = {"file": columns["path"], "kind": ["ape" if label else "yak" for label in columns["label"]]}
    pq.write_table(pa.table({**named, "split": ["val", "train"] * 15}), tmp_path / "named.parquet")
    report = pack(tmp_path / "named.parquet", tmp_path / "c", image_column="file", label_column="kind")
    assert report.samples == {"val": 15, "train": 15}
    assert read_index(tmp_path / "c").class_names == ("ape", "yak")


def test_parquet_mistakes_are_named(tmp_path: Path) -> None:
    write_images(tmp_path, 3, 1)
    for columns, words in (
        ({"file": ["a"], "label": [1]}, "needs the columns path and label, has file, label"),
        ({"path": ["00000.jpg", "nope.png"], "label": [0, 1]}, "row 1: no file 'nope.png'"),
        ({"path": ["00000.jpg"], "label": [None]}, "row 0: path '00000.jpg', label ''"),
        ({"path": [b"\xff\xd8"], "label": [0]}, "images inside Parquet"),
        ({"path": ["00000.jpg"], "label": [2_000_000]}, "label 2000000 is beyond 1000000 classes"),
    ):
        pq.write_table(pa.table(columns), tmp_path / "list.parquet")
        with pytest.raises(ConfigError, match=words):
            pack(tmp_path / "list.parquet", tmp_path / "out")
    whole = (tmp_path / "list.parquet").read_bytes()
    (tmp_path / "list.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match="not a Parquet file"):
        pack(tmp_path / "list.parquet", tmp_path / "out")


def test_a_saved_dataset_keeps_bytes_splits_and_classes(tmp_path: Path) -> None:
    report = pack(SAVED, tmp_path / "out", shuffle=False, workers=2, samples_per_shard=6)
    assert report.samples == {"train": 20, "test": 6}
    index = read_index(tmp_path / "out")
    assert index.class_names == ("ape", "yak", "zebra")
    found = [*samples(tmp_path / "out").values(), *samples(tmp_path / "out", "test").values()]
    assert [int(label) for _, label in found] == [i % 3 for i in range(26)]
    for i, (data, _) in enumerate(found):
        rng = np.random.default_rng(i)
        wanted = Image.fromarray(rng.integers(0, 256, (13 + i % 7, 17 + i % 5, 3), dtype=np.uint8))
        assert decode(data).size == wanted.size
        assert i % 3 != 1 or (np.asarray(decode(data)) == np.asarray(wanted)).all()
    pack(SAVED / "train", tmp_path / "one")
    assert read_index(tmp_path / "one").num_samples == 20


def test_saved_datasets_that_are_unclear_or_damaged_are_named(tmp_path: Path) -> None:
    def change(name: str, old: str, new: str) -> Path:
        shutil.rmtree(tmp_path / "in", ignore_errors=True)
        shutil.copytree(SAVED, tmp_path / "in")
        path = tmp_path / "in" / name
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
        return tmp_path / "in"

    for name, old, new, words in (
        ("train/dataset_info.json", '"ape"', '"cat"', "different classes"),
        ("train/dataset_info.json", '"image"', '"photo"', "not a dataset that can be read"),
        ("train/dataset_info.json", '"_type": "Image"', '"_type": "Audio"', "0 columns could be the image"),
        ("train/state.json", "data-00000", "../data-00000", "names files outside its folder"),
        ("train/state.json", "data-00000", "data-00007", "not a dataset that can be read"),
        ("train/state.json", "{", "[", "not a dataset that can be read"),
        ("train/state.json", '"_split"', '"_indices_files": [1], "_split"', "keeps an order beside"),
    ):
        with pytest.raises(ConfigError, match=words):
            pack(change(name, old, new), tmp_path / "out")
    with pytest.raises(ConfigError, match="has no column 'fine'; it has image, label"):
        pack(SAVED, tmp_path / "out", label_column="fine")
    assert not (tmp_path / "out").exists()


def test_a_set_is_sharded_anew(tmp_path: Path) -> None:
    made = make_set(tmp_path, holdout=0.2)
    pack(made, tmp_path / "out", samples_per_shard=20, seed=5)
    for split in ("train", "test"):
        old, new = read_index(made, split), read_index(tmp_path / "out", split)
        assert (old.num_samples, old.num_classes) == (new.num_samples, new.num_classes)
        assert samples(made, split) == samples(tmp_path / "out", split)
        assert list(samples(made, split)) != list(samples(tmp_path / "out", split))
    assert verify(tmp_path / "out").ok


def test_loose_tars_are_packed_and_their_odd_members_left_behind(tmp_path: Path) -> None:
    made = make_set(tmp_path, 26)
    loose = tmp_path / "loose"
    loose.mkdir()
    first = members(made / "odd-train-000000.tar")
    for i in (1, 5):  # labels as JSON
        first[i][0].name = first[i][0].name.replace(".cls", ".json")
        first[i] = (first[i][0], json.dumps({"label": int(first[i][1]), "url": "x"}).encode())
    note = tarfile.TarInfo(first[0][0].name.split(".")[0] + ".txt")
    rewrite(loose / "a.tar", [*first[:2], (note, b"said"), *first[2:]])
    second = members(made / "odd-train-000001.tar")
    second[3] = (second[3][0], b"cat")
    rewrite(loose / "b.tar", second)
    rewrite(loose / "c.tar", second)  # all keys a second time
    report = pack(loose, tmp_path / "out", workers=1)
    assert report.samples == {"train": 26 + 11}
    assert report.num_classes == 5
    assert len(report.unreadable) == 2
    assert all("label 'cat' is not an integer" in text for text in report.unreadable)
    assert report.unreadable[0].split("[")[0] in ("b.tar", "c.tar")
    found = verify(tmp_path / "out")
    assert found.ok
    assert found.warnings == ()
    assert pack(loose / "a.tar", tmp_path / "one").samples == {"train": 13}


def test_too_large_images_shrink_and_the_others_stay(tmp_path: Path) -> None:
    write_images(tmp_path, 12, 3)
    picture(0).resize((64, 40)).save(tmp_path / "00000.jpg")
    picture(1).resize((30, 90)).save(tmp_path / "00001.png")
    picture(2).convert("CMYK").resize((50, 50)).save(tmp_path / "00003.jpg")
    pack(tmp_path / "list.csv", tmp_path / "out", max_side=32)
    found = samples(tmp_path / "out")
    sizes = {key: decode(image).size for key, (image, _) in found.items()}
    assert (sizes["00000"], sizes["00001"], sizes["00003"]) == ((32, 20), (11, 32), (32, 32))
    assert Image.open(io.BytesIO(found["00003"][0])).mode == "RGB"
    assert found["00004"][0] == (tmp_path / "00004.png").read_bytes()
    pack(tmp_path / "list.csv", tmp_path / "webp", encode="webp", quality=80)
    names = [m.name for tar in (tmp_path / "webp").glob("*.tar") for m, _ in members(tar)]
    assert {name.split(".")[1] for name in names} == {"webp", "cls"}


def test_a_file_is_what_its_header_says_and_not_its_name(tmp_path: Path) -> None:
    write_images(tmp_path, 6, 3)
    shutil.copy(tmp_path / "00001.png", tmp_path / "00000.jpg")
    pack(tmp_path / "list.csv", tmp_path / "out")
    names = {m.name for m, _ in members(tmp_path / "out/list-train-000000.tar")}
    assert "00000.png" in names


def test_check_decode_finds_what_a_header_hides(tmp_path: Path) -> None:
    table = write_images(tmp_path, 9, 3)
    picture(3).resize((200, 200)).save(tmp_path / "00003.jpg")
    whole = (tmp_path / "00003.jpg").read_bytes()
    (tmp_path / "00003.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    assert pack(table, tmp_path / "header").samples == {"train": 9}
    report = pack(table, tmp_path / "decode", check="decode")
    assert report.samples == {"train": 8}
    assert report.unreadable[0].startswith("00003.jpg: undecodable image")


def test_a_sorted_source_is_shuffled_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i in range(4):
        write_images(tmp_path / "in" / f"class{i}", 20, 2)
    report = pack(tmp_path / "in", tmp_path / "out")
    assert report.warnings == ("split train: the source lies sorted by class; it was shuffled",)
    assert verify(tmp_path / "out").warnings == ()
    kept = pack(tmp_path / "in", tmp_path / "kept", shuffle=False)
    assert "neighbours have the same label" in kept.warnings[0]
    assert "warning: split train: neighbours" in str(kept)
    read_index(tmp_path / "out")
    assert caplog.text == ""
    read_index(tmp_path / "kept")  # as a run does when it starts
    assert "neighbours in split train have the same label" in caplog.text
    again = pack(tmp_path / "kept", tmp_path / "again", shuffle=False)  # labels that only the tars know
    assert "neighbours have the same label" in again.warnings[0]
    assert pack(tmp_path / "kept", tmp_path / "mixed").warnings == ()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"check": "all"}, "check='all': use header or decode"),
        ({"max_side": 0}, "max_side=0: use 1 px or more"),
        ({"encode": "gif"}, "encode='gif': use jpg, png, webp"),
        ({"quality": 0}, r"quality=0: use 1 … 100"),
        ({"workers": 0}, "workers=0: use 1 or more"),
        ({"seed": -1}, "seed=-1"),
        ({"shard_mib": float("nan")}, "shard_mib=nan"),
        ({"samples_per_shard": 0}, "samples_per_shard=0"),
        ({"holdout": 1.0}, "holdout=1.0"),
        ({"split": "a/b"}, "split='a/b'"),
    ],
)
def test_options_that_cannot_be_are_named(tmp_path: Path, options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        pack("digits", tmp_path / "out", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"path,label\n00000.jpg\n", "line 2: path '00000.jpg', label ''"),
        (b"path,label\n\xff.jpg,1\n", "is not a CSV file in UTF-8"),
        (b"path,label\n00000.jpg,999999999\n", "label 999999999 is beyond 1000000 classes"),
        (b'path,label\n"00000.jpg,1\n', "is not a CSV file"),
        (b"path,label\na\0.jpg,1\n", "line"),
        (b"", "needs the columns path and label"),
    ],
)
def test_csv_damage_is_named(tmp_path: Path, text: bytes, words: str) -> None:
    write_images(tmp_path, 1, 1)
    (tmp_path / "list.csv").write_bytes(text)
    with pytest.raises(ConfigError, match=words):
        pack(tmp_path / "list.csv", tmp_path / "out")


def test_a_source_is_never_overwritten(tmp_path: Path) -> None:
    made = make_set(tmp_path)
    before = files(made)
    for source in (made, made / "odd-train-000000.tar"):
        with pytest.raises(ConfigError, match="is where the source lies"):
            pack(source, made, overwrite=True)
    assert files(made) == before


def test_what_is_no_regular_file_is_left_out_by_name(tmp_path: Path) -> None:
    """A pipe would be waited for, for ever; a link that leads nowhere has nothing to read."""
    write_images(tmp_path / "in/class", 4, 1)
    os.mkfifo(tmp_path / "in/class/pipe.jpg")
    (tmp_path / "in/class/nowhere.jpg").symlink_to(tmp_path / "none.jpg")
    (tmp_path / "in/class/link.jpg").symlink_to(tmp_path / "in/class/00000.jpg")
    report = pack(tmp_path / "in", tmp_path / "out")
    assert report.samples == {"train": 5}
    assert set(report.ignored) == {"class/list.csv", "class/nowhere.jpg", "class/pipe.jpg"}


def test_an_image_that_vanishes_is_an_error_and_not_a_skip(tmp_path: Path) -> None:
    table = write_images(tmp_path / "in", 12, 3)

    def progress(done: int, of: int) -> None:
        for path in (tmp_path / "in").glob("*.png"):
            path.unlink(missing_ok=True)

    with pytest.raises(UserError, match=r"\.png cannot be read"):
        pack(table, tmp_path / "out", samples_per_shard=2, workers=1, progress=progress)
    assert not (tmp_path / "out/_info.json").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_disk_that_is_full_is_told_and_gone_on_from(tmp_path: Path, workers: int) -> None:
    """The limit of a file's size stands for the disk's: writing beyond it fails in the same call."""
    table = write_images(tmp_path / "in", 12, 3)
    Image.effect_noise((300, 300), 90).save(tmp_path / "in/00010.png")
    options = {"samples_per_shard": 2, "workers": workers}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(UserError, match=r"cannot be written: .*File too large"):
            pack(table, tmp_path / "out", **options)  # type: ignore[arg-type]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "out/_info.json").exists()
    pack(table, tmp_path / "out", **options)  # type: ignore[arg-type]
    pack(table, tmp_path / "whole", **options)  # type: ignore[arg-type]
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    with pytest.raises(UserError, match=r"cannot be written: .*Not a directory"):
        pack(table, table / "out")


def test_odd_file_names_become_safe_keys(tmp_path: Path) -> None:
    (tmp_path / "in/class").mkdir(parents=True)
    names = ["a.b.c.jpg", "猫.jpg", "犬.jpg", "-x.jpg", "n" * 120 + ".jpg", os.fsdecode(b"\xff\xfe.jpg")]
    for i, name in enumerate(names):
        picture(i).save(tmp_path / "in/class" / name)
    pack(tmp_path / "in", tmp_path / "out")
    found = verify(tmp_path / "out")
    assert found.ok
    assert found.samples == len(names)
    assert all(key.replace("_", "").replace("-", "").isalnum() for key in samples(tmp_path / "out"))


@pytest.mark.parametrize(
    ("package", "words", "fix"),
    [
        ("pyarrow", ["pack", str(SAVED)], r"pip install 'vmamba-dist\[tables\]'"),
        ("numba", ["fractal"], r"pip install 'vmamba-dist\[fractals\]'"),
    ],
)
def test_a_missing_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, words: list[str], fix: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    for module in ("vmamba_dist.data.tables", "vmamba_dist.data.datasets.fractals"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(ConfigError, match=fix):
        command.main([*words, str(tmp_path / "out")])


def test_the_command_packs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write_images(tmp_path, 30, 3)
    words = ["--max-side", "12", "--encode", "jpg", "--check", "decode", "--workers", "2", "--holdout", "0.2"]
    assert command.main(["pack", str(table), str(tmp_path / "out"), *words]) == 0
    assert "3 classes" in capsys.readouterr().out
    assert all(max(decode(image).size) == 12 for image, _ in samples(tmp_path / "out").values())


def test_signals_leave_no_set(tmp_path: Path) -> None:
    """SIGTERM, as a batch system sends it: the pack ends, its workers too, and what is finished is kept."""
    code = (
        "import sys; from vmamba_dist.data.shards import pack\n"
        "pack('digits', sys.argv[1], samples_per_shard=3, workers=2)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], start_new_session=True)
    while len(list(tmp_path.glob("out/_packing/*.tar.json"))) < 3:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == -signal.SIGTERM
    deadline = time.monotonic() + 10
    while True:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        assert time.monotonic() < deadline, "a worker outlived the pack"
        time.sleep(0.02)
    assert not (tmp_path / "out/_info.json").exists()
    assert len(list(tmp_path.glob("out/*.tar"))) >= 3
