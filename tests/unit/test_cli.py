"""The command line: one table, light to load, mistakes in one line."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from vmamba_dist import cli
from vmamba_dist.checkpoint import store
from vmamba_dist.config import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def vmamba(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "vmamba_dist.cli", *words]
    return subprocess.run(line, capture_output=True, text=True, cwd=cwd, timeout=120, check=False)


@pytest.mark.parametrize("name", cli.VERBS)
def test_every_listed_verb_is_built(name: str) -> None:
    module, _, function = cli.VERBS[name].target.partition(":")
    source = importlib.util.find_spec(module)
    assert source is not None
    assert source.origin is not None
    assert f"def {function}(" in Path(source.origin).read_text()


def test_help_names_every_verb_in_under_half_a_second() -> None:
    """Of a processor's time: what else a machine does is not its fault."""
    times = []
    for _ in range(3):
        before = os.times()
        done = vmamba("--help")
        after = os.times()
        spent = after.children_user - before.children_user
        times.append(spent + after.children_system - before.children_system)
        assert done.returncode == 0
        assert all(f"  {name} " in done.stdout for name in cli.VERBS)
    assert min(times) < 0.5


@pytest.mark.parametrize("name", cli.VERBS)
def test_each_verb_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if cli.VERBS[name].own_help:
        with pytest.raises(SystemExit) as end:
            cli.run([name, "--help"])
        assert end.value.code == 0
    else:
        assert cli.run([name, "--help"]) == 0
    assert f"usage: vmamba {name}" in capsys.readouterr().out


def test_a_misspelt_verb_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean train"):
        cli.run(["trian"])


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["train", "optim.lrr=1"], "did you mean optim.lr?"),
        (["submit", "config=configs/nowhere.yaml"], "no such file"),
        (["submit", "lr"], "is not key=value"),
        (["shards", "show", "nowhere"], "no set of shards"),
        (["checkpoints", "list", "nowhere"], "no checkpoint there"),
    ],
    ids=["unknown key", "no config", "no equals sign", "no shards", "no checkpoint"],
)
def test_a_mistake_is_one_line_and_exit_code_2(words: list[str], part: str, tmp_path: Path) -> None:
    done = vmamba(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert part in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_our_own_errors_keep_their_traceback() -> None:
    def broken(words: Sequence[str]) -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.guarded(broken, [])


def test_an_interrupt_is_no_traceback() -> None:
    def interrupted(words: Sequence[str]) -> int:
        raise KeyboardInterrupt

    assert cli.guarded(interrupted, []) == 130


def test_checkpoints_tells_whole_from_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    final = store.directory(tmp_path / "checkpoints", 7)
    work = store.prepare(final)
    (work / "data.bin").write_bytes(b"seven")
    meta = store.Meta(7, 448, 0, {}, 2, "ddp", "d1", {"optim.lr": 0.1}, {"eval/ema/top1": 50.0})
    files = {"data.bin": store.describe(work / "data.bin")}
    store.write_manifest(work, store.Manifest(meta, files))
    store.publish(work, final)

    assert cli.run(["checkpoints", "list", str(tmp_path)]) == 0
    assert "step-000000007  epoch 0  ddp × 2" in capsys.readouterr().out
    assert cli.run(["checkpoints", "show", str(final)]) == 0
    assert "optim.lr=0.1" in capsys.readouterr().out
    assert cli.run(["checkpoints", "verify", str(tmp_path)]) == 0
    (final / "data.bin").write_bytes(b"eight")
    assert cli.run(["checkpoints", "verify", str(final)]) == 1
    assert "data.bin: sha256 differs" in capsys.readouterr().out


def test_shards_pack_verify_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "digits"
    assert cli.run(["shards", "pack", "digits", str(folder), "--samples-per-shard", "500"]) == 0
    assert cli.run(["shards", "verify", str(folder)]) == 0
    assert "1797 samples" in capsys.readouterr().out
    assert cli.run(["shards", "show", str(folder)]) == 0
    assert "10 classes" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="already"):
        cli.run(["shards", "pack", "digits", str(folder)])
    damaged = sorted(folder.glob("*.tar"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-20000])
    assert cli.run(["shards", "verify", str(folder)]) == 1
    assert damaged.name in capsys.readouterr().out


@pytest.mark.parametrize("name", ["submit", "sweep", "status"])
def test_a_script_says_what_it_takes(name: str) -> None:
    line = [sys.executable, str(ROOT / "launch" / f"{name}.py"), "--help"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"python launch/{name}.py" in done.stdout
