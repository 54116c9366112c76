"""The quick start, end to end: real images, real job, a fresh process that evaluates."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vmamba_dist.cluster import follow

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).resolve().parents[2]
VMAMBA = [sys.executable, "-m", "vmamba_dist.cli"]


def call(line: list[str]) -> str:
    done = subprocess.run(line, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(600)
def test_the_quick_start_reads_digits(tmp_path: Path) -> None:
    """Packed, trained by launch/submit.py on two processes, evaluated afresh: 98 % of the test split or more."""
    data, run = tmp_path / "digits", tmp_path / "run"
    submit = [sys.executable, str(ROOT / "launch" / "submit.py"), "config=configs/quickstart.yaml"]
    submit += [f"run.dir={run}", f"data.train={data}"]
    call([*VMAMBA, "shards", "pack", "digits", str(data)])
    shown = call(submit)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = lines[-1]["step"]
    assert [line["step"] for line in lines] == list(range(1, last + 1))
    assert follow.STEP.findall(shown)[-1] == (str(last), str(last))  # what the bar on a terminal reads

    result = json.loads(call([*VMAMBA, "eval", f"eval.checkpoint={run}", f"eval.data={data}"]))
    assert result["step"] == last
    assert result["num_samples"] == 367
    assert result["top1"] >= 98

    assert "nothing to do" in call(submit)
    assert "samples/s" in call([sys.executable, str(ROOT / "launch" / "status.py"), str(run)])
