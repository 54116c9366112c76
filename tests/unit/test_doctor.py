"""The doctor looks at the real machine; what it cannot have here is shown to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmamba_dist import doctor
from vmamba_dist.config import ConfigError


def test_this_machine_can_train(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    for name in (
        "python",
        "torch",
        "gloo",
        "GPUs",
        "cores",
        "memory",
        "disk",
        "triton",
        "deepspeed",
    ):
        assert f"{name} " in out
    for name in ("g++", "ninja", "srun", "sbatch"):
        assert f"{name} " in out


def test_each_missing_thing_comes_with_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    missing = [finding for finding in doctor.findings() if finding.name in ("g++", "ninja", "srun", "sbatch")]
    assert len(missing) == 4
    assert all(finding.fix and not finding.blocks for finding in missing)
    assert all("install" in finding.fix and finding.fix in finding.line() for finding in missing)


def test_what_no_command_installs_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "NEEDED_MEMORY_GIB", 1e9)
    monkeypatch.setattr(doctor, "NEEDED_DISK_GIB", 1e9)
    short = [finding.line() for finding in doctor.findings() if finding.name in ("memory", "disk")]
    assert len(short) == 2
    assert all("no command adds" in line for line in short)


def test_a_missing_package_is_named() -> None:
    found = doctor.package("no-such-distribution", "pip install it", needed=True)
    assert found.blocks
    assert "MISSING" in found.line()
    assert "pip install it" in found.line()


def test_training_does_not_work_where_something_needed_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "NEEDED_DISK_GIB", 1e9)
    assert doctor.main([]) == 1
    assert "does not work here yet: disk" in capsys.readouterr().out


def test_it_takes_no_words() -> None:
    with pytest.raises(ConfigError, match="takes no words"):
        doctor.main(["now"])
