"""Checkpoints as directories: what counts as one, what damage is found, what is kept."""

import dataclasses
import hashlib
import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmamba_dist.checkpoint import command, store
from vmamba_dist.checkpoint.store import CheckpointError, Damaged, Manifest, Meta
from vmamba_dist.config.schema import ConfigError


def meta(step: int, **metrics: float) -> Meta:
    return Meta(
        step=step,
        samples=step * 7,
        epoch=0,
        state={"skipped": [[3, 4]], "lanes": 12},
        world_size=2,
        engine="ddp",
        config_digest="d1",
        trajectory={"data.block": 16, "optim.betas": [0.9, 0.999]},
        metrics=metrics,
        extra={"note": "x"},
    )


def make(checkpoints: Path, step: int, seed: int = 0, **metrics: float) -> Path:
    """A checkpoint of three small files of odd sizes."""
    final = store.directory(checkpoints, step)
    path = store.prepare(final)
    draw = random.Random(seed * 1000 + step)
    for name, size in ((".metadata", 1), ("__0_0.distcp", 63), ("__1_0.distcp", 500)):
        (path / name).write_bytes(draw.randbytes(size))
    files = {p.name: store.describe(p) for p in path.iterdir()}
    store.write_manifest(path, Manifest(meta(step, **metrics), files))
    store.publish(path, final)
    return final


def names(checkpoints: Path) -> set[str]:
    return {p.name for p in checkpoints.iterdir()}


def test_a_manifest_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = make(tmp_path, 100, top1=0.1 + 0.2)
    assert path.name == "step-000000100"
    manifest = store.read_manifest(path)
    assert manifest.meta == meta(100, top1=0.1 + 0.2)
    assert set(manifest.files) == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    assert store.verify_checkpoint(path) == []
    content = json.loads((path / "manifest.json").read_text())
    assert {"format", "step", "epoch", "samples", "world_size", "engine", "config_digest", "files"} <= set(
        content
    )


def test_a_manifest_may_hold_what_json_changes(tmp_path: Path) -> None:
    path = tmp_path / "step-000000001"
    path.mkdir()
    odd = dataclasses.replace(
        meta(1), state={"by_epoch": {10: 1, 9: 2}, "pair": (1, 2)}, metrics={"loss": math.inf}
    )
    store.write_manifest(path, Manifest(odd, {}))
    read = store.read_manifest(path).meta
    assert read.state == {"by_epoch": {"10": 1, "9": 2}, "pair": [1, 2]}
    assert read.metrics == {"loss": math.inf}


@settings(deadline=None)
@given(data=st.data())
def test_every_flipped_bit_is_found(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = make(tmp_path_factory.mktemp("flip"), 7)
    file = path / data.draw(st.sampled_from(sorted(p.name for p in path.iterdir())))
    content = bytearray(file.read_bytes())
    bit = data.draw(st.integers(0, len(content) * 8 - 1))
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)
    assert [fault.file for fault in store.verify_checkpoint(path)] == [file.name]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"x")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (Path.unlink, "missing"),
        (cut, "truncated: 499 bytes of 500"),
        (lengthen, "too long: 501 bytes, should be 500"),
        (lambda file: file.write_bytes(bytes(500)), "sha256 differs"),
    ],
    ids=["missing", "truncated", "too-long", "other-content"],
)
def test_a_fault_names_file_and_reason(tmp_path: Path, damage: Callable[[Path], object], reason: str) -> None:
    path = make(tmp_path, 7)
    damage(path / "__1_0.distcp")
    assert [str(fault) for fault in store.verify_checkpoint(path)] == [f"__1_0.distcp: {reason}"]


def test_without_its_own_manifest_a_directory_is_no_checkpoint(tmp_path: Path) -> None:
    path = make(tmp_path, 7)
    moved = path.rename(tmp_path / "step-000000008")
    assert "is of step 7" in store.verify_checkpoint(moved)[0].reason
    for content in ("", "[]", "{}", '{"format": 1, "digest": ""}', '{"format'):
        (moved / "manifest.json").write_text(content)
        with pytest.raises(Damaged, match=r"manifest\.json"):
            store.read_manifest(moved)
    (moved / "manifest.json").unlink()
    with pytest.raises(Damaged, match="missing"):
        store.read_manifest(moved)


def test_a_newer_format_is_not_damage(tmp_path: Path) -> None:
    path = make(tmp_path, 7)
    content = json.loads((path / "manifest.json").read_text())
    content["format"] = 2
    del content["digest"]
    content["digest"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="format 2") as caught:
        store.verify_checkpoint(path)
    assert not isinstance(caught.value, Damaged)


def test_only_names_of_ours_are_listed(tmp_path: Path) -> None:
    assert store.list_checkpoints(tmp_path / "none") == []
    for step in (1000, 9, 12345678901):
        make(tmp_path, step)
    for other in (
        "step-000000010.tmp",
        "step-000000011.corrupt-1",
        "step-12",
        "step-000000013.replaced",
        "best",
    ):
        (tmp_path / other).mkdir()
    (tmp_path / "step-000000014").write_text("a file")
    assert [store.step_of(p) for p in store.list_checkpoints(tmp_path)] == [9, 1000, 12345678901]


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(0, 30))
def test_ranks_share_the_files_each_exactly_once(size: int, files: int) -> None:
    manifest = Manifest(meta(1), {f"f{i}": store.FileRecord(i * i, "") for i in range(files)})
    shares = [store.share(manifest, rank, size) for rank in range(size)]
    assert sorted(name for each in shares for name in each) == sorted(manifest.files)


def test_damaged_directories_are_numbered(tmp_path: Path) -> None:
    for expected in (1, 2, 3):
        assert store.set_aside(make(tmp_path, 7)).name == f"step-000000007.corrupt-{expected}"
    assert store.list_checkpoints(tmp_path) == []


def test_a_save_of_the_same_step_replaces(tmp_path: Path) -> None:
    make(tmp_path, 7, seed=1)
    path = make(tmp_path, 7, seed=2, top1=0.5)
    assert store.verify_checkpoint(path) == []
    assert store.read_manifest(path).meta.metrics == {"top1": 0.5}
    assert names(tmp_path) == {"step-000000007"}


def test_a_replacement_killed_between_its_renames_is_undone(tmp_path: Path) -> None:
    path = make(tmp_path, 7, seed=1)
    content = (path / "__1_0.distcp").read_bytes()
    path.rename(tmp_path / "step-000000007.replaced")
    store.recover(tmp_path)
    assert store.verify_checkpoint(path) == []
    assert (path / "__1_0.distcp").read_bytes() == content
    # Killed after both: the new one stays.
    make(tmp_path, 8).rename(tmp_path / "step-000000008.replaced")
    path = make_beside_replaced(tmp_path)
    store.recover(tmp_path)
    assert store.read_manifest(path).meta.metrics == {"top1": 1.0}
    assert names(tmp_path) == {"step-000000007", "step-000000008"}


def make_beside_replaced(checkpoints: Path) -> Path:
    """Step 8 made elsewhere and moved in, since a save here would first put the replaced one back."""
    made = make(checkpoints.parent / "elsewhere", 8, top1=1.0)
    return made.rename(checkpoints / made.name)


def test_a_save_removes_what_kills_left_and_nothing_else(tmp_path: Path) -> None:
    for other in ("step-000000003.tmp", "step-000000002.corrupt-1", "notes.tmp", "step-9.tmp"):
        (tmp_path / other).mkdir()
        (tmp_path / other / "x").write_text("x")
    make(tmp_path, 5)
    assert names(tmp_path) == {"step-000000005", "step-000000002.corrupt-1", "notes.tmp", "step-9.tmp"}


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"keep": 2}, {90, 100}),
        ({"keep": 1, "keep_every": 50}, {50, 100}),
        ({"keep": 1, "keep_best": True, "metric": "top1"}, {30, 100}),
        ({"keep": 1, "keep_best": True, "metric": "ema.loss"}, {20, 100}),
        ({"keep": 1, "keep_best": True, "metric": "absent"}, {100}),
        ({"keep": 1, "metric": "top1"}, {100}),
        ({"keep": 99}, set(range(10, 101, 10))),
    ],
    ids=lambda value: str(value),
)
def test_retention(tmp_path: Path, options: dict[str, object], kept: set[int]) -> None:
    top1 = {10: 0.1, 20: math.nan, 30: 0.9, 40: 0.9, 70: 0.8}  # a tie: the earliest stays
    loss = {20: 0.5, 60: 0.5, 70: 0.7}
    for step in range(10, 101, 10):
        metrics = {name: of[step] for name, of in (("top1", top1), ("ema.loss", loss)) if step in of}
        make(tmp_path, step, 0, **metrics)
    foreign = {"step-000000005", "step-000000015.corrupt-1", "backup-of-step-000000010", "step-000000200"}
    for name in foreign:
        (tmp_path / name).mkdir()
    gone = store.retire(tmp_path, store.directory(tmp_path, 100), **options)  # type: ignore[arg-type]
    assert {store.step_of(p) for p in gone} == set(range(10, 101, 10)) - kept
    assert names(tmp_path) == foreign | {f"step-{step:09d}" for step in kept}


def test_the_one_just_published_stays_though_later_steps_exist(tmp_path: Path) -> None:
    """A run that went back to an earlier checkpoint saves below steps that it once reached."""
    for step in (70, 80, 90):
        make(tmp_path, step)
    gone = store.retire(tmp_path, make(tmp_path, 60), keep=2)
    assert {store.step_of(p) for p in gone} == {70}


def test_the_command_tells_what_is_unfinished_from_what_is_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = tmp_path / "checkpoints"
    with pytest.raises(ConfigError, match="no checkpoint there; name"):
        command.main(["list", str(tmp_path)])
    make(checkpoints, 10, top1=0.5)
    make(checkpoints, 20)
    (checkpoints / "step-000000030.tmp").mkdir()
    for place in (tmp_path, checkpoints):
        assert command.main(["list", str(place)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines] == [
            "step-000000010",
            "step-000000020",
            "step-000000030.tmp",
        ]
        assert "top1 0.5" in lines[0]
        assert "unfinished" in lines[2]
    assert command.main(["verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "step-000000010  whole\nstep-000000020  whole\n"
    cut(checkpoints / "step-000000010" / "__0_0.distcp")
    assert command.main(["verify", str(tmp_path)]) == 1
    assert "step-000000010  __0_0.distcp: truncated" in capsys.readouterr().out
    assert command.main(["show", str(checkpoints / "step-000000020")]) == 0
    assert "samples     140" in capsys.readouterr().out
    for step in (10, 20):
        store.remove(checkpoints / f"step-{step:09d}")
    with pytest.raises(ConfigError, match=r"but step-000000030\.tmp, which is not finished"):
        command.main(["list", str(tmp_path)])


def test_a_checkpoint_that_the_run_deletes_meanwhile_is_not_called_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, 10)
    make(tmp_path, 20)
    listed = command.list_checkpoints

    def list_then_retire(path: Path) -> list[Path]:
        found = listed(path)
        for gone in found[:1]:
            store.remove(gone)
        return found

    monkeypatch.setattr(command, "list_checkpoints", list_then_retire)
    assert command.main(["verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("step-000000010  deleted meanwhile")
    make(tmp_path, 10)
    assert command.main(["list", str(tmp_path)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["step-000000020"]


def test_nor_is_one_that_it_deletes_while_its_files_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path, 10)
    read = store.describe

    def retire_then_read(file: Path) -> store.FileRecord:
        if path.exists():
            store.remove(path)
        return read(file)

    monkeypatch.setattr(store, "describe", retire_then_read)
    assert command.main(["verify", str(path)]) == 0
    assert capsys.readouterr().out.startswith("step-000000010  deleted meanwhile")
