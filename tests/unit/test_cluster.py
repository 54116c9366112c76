"""The parts of a job that need no job: its plan, its log's tail, its status, its environment."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from vmamba_dist.cluster import env, executors, status, submit
from vmamba_dist.cluster.follow import Requests, Tail
from vmamba_dist.cluster.job import TrainJob
from vmamba_dist.cluster.submit import plan
from vmamba_dist.config import ConfigError, load, to_dict


def test_a_job_survives_its_pickle() -> None:
    job = TrainJob(to_dict(load(["optim.lr=1e-3"])), "file:///nowhere", None, None)
    assert pickle.loads(pickle.dumps(job)) == job


def test_a_plan_lists_what_is_not_a_default_and_the_command() -> None:
    text = plan("submit", ["optim.lr=0.25", "launch.tasks_per_node=3", "run.dir=my runs/a"]).text()
    assert "  optim.lr=0.25" in text
    assert "3 processes" in text
    assert " submit optim.lr=0.25 launch.tasks_per_node=3 'run.dir=my runs/a'" in text
    assert "weight_decay" not in text


def test_the_command_to_go_on_with_runs_anywhere(tmp_path: Path) -> None:
    """From another folder, in a shell on whose PATH the environment is not."""
    words = ["optim.lr=0.25", f"run.dir={tmp_path / 'my runs'}"]
    ours = plan("submit", words)
    done = subprocess.run(
        ["sh", "-c", f"{ours.command} --dry-run"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    assert f"run      {tmp_path / 'my runs'}\n" in done.stdout
    assert "optim.lr=0.25" in done.stdout


def test_a_tail_gives_each_whole_line_once(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    tail = Tail(log, position=4)
    assert tail.lines() == []
    log.write_text("old\nfirst\nsec")
    assert tail.lines() == ["first"]
    assert tail.lines() == []
    with log.open("a") as file:
        file.write("ond\nthird\n")
    assert tail.lines() == ["second", "third"]


def test_a_wish_to_stop_is_counted_and_the_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    requests = Requests()
    with requests.listening():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), number)
    assert requests.count == 3
    assert signal.getsignal(signal.SIGTERM) == before


def test_status_counts_no_torn_line_and_the_median_step(tmp_path: Path) -> None:
    rates = [1.0, 300.0, 310.0, 290.0, 5.0]
    lines = [
        json.dumps({"step": i, "loss": 2 / i, "samples_per_s": rate}) + "\n"
        for i, rate in enumerate(rates, 1)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 6, "lo')
    text = status.text(tmp_path)
    assert "step 5, loss 0.4000" in text
    assert "290 samples/s" in text
    assert f"rm -r {tmp_path}" in text


def test_status_says_where_the_loss_is_no_number(tmp_path: Path) -> None:
    line = {"step": 7, "loss": None, "samples_per_s": None}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert "step 7, loss not finite\n" in status.text(tmp_path)


def test_status_of_a_run_that_has_not_begun(tmp_path: Path) -> None:
    assert "no step yet" in status.text(tmp_path)
    with pytest.raises(ConfigError, match="no run directory"):
        status.text(tmp_path / "nowhere")


def test_threads_are_shared_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = len(os.sched_getaffinity(0))
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    env.share_threads(1)
    assert os.environ["OMP_NUM_THREADS"] == "7"
    monkeypatch.delenv("OMP_NUM_THREADS")
    env.share_threads(1)
    assert os.environ["OMP_NUM_THREADS"] == str(cores)
    monkeypatch.delenv("OMP_NUM_THREADS")
    env.share_threads(1000)
    assert os.environ["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize("value", [None, "", "2,3", "GPU-8b2c1d"], ids=["unset", "none", "two", "by name"])
def test_a_job_sees_the_submitters_gpus(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if value is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    seen = env.visible_devices()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    env.show_devices(seen)
    assert env.visible_devices() == value


def test_what_starts_apart_from_the_terminal_writes_to_its_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "controller.log"
    before = signal.getsignal(signal.SIGINT)
    with executors.apart_from_terminal(log):
        os.system("echo hidden")
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    os.system("echo shown")
    assert log.read_text() == "hidden\n"
    assert capfd.readouterr().out == "shown\n"
    assert signal.getsignal(signal.SIGINT) == before


def test_a_gpu_has_one_process_and_asking_for_gpus_asks_for_cuda() -> None:
    asked = plan("submit", ["launch.gpus_per_node=2"]).config
    assert (asked.launch.tasks, asked.precision.device) == (2, "cuda")
    assert plan("submit", []).config.launch.tasks == 1
    for words, says in (
        (["launch.gpus_per_node=2", "precision.device=cpu"], "precision.device=cpu beside"),
        (
            ["launch.gpus_per_node=2", "launch.tasks_per_node=4"],
            "launch.tasks_per_node=4: a GPU has one process",
        ),
        (["launch.nodes=2", "launch.cluster=local"], "launch.nodes=2: launch.cluster=local is one machine"),
    ):
        with pytest.raises(ConfigError, match=says):
            plan("submit", words)


@pytest.mark.parametrize("folder", ["a#b", "a?b", "a\tb"])
def test_processes_do_not_meet_where_torch_would_cut_the_path(folder: str, tmp_path: Path) -> None:
    words = [f"run.dir={tmp_path / folder}"]
    assert plan("train", words).run_dir == tmp_path / folder  # one process meets nobody
    with pytest.raises(ConfigError, match=r"run\.dir=.*without '#', '\?'"):
        plan("submit", [*words, "launch.tasks_per_node=2"])


@pytest.mark.parametrize("folder", ["a b", "a%23b", "a;b=1,c", "ä"])
def test_torch_meets_at_the_file_of_the_job_folder(folder: str, tmp_path: Path) -> None:
    words = ["launch.tasks_per_node=2", f"run.dir={tmp_path / folder}"]
    place = plan("submit", words).job_folder
    place.mkdir(parents=True)
    url = submit.rendezvous(place)
    store, _, _ = next(torch.distributed.rendezvous(url, rank=0, world_size=1))
    store.set("met", "here")
    assert (place / "rendezvous").exists()


def test_a_plan_names_the_size_of_the_model() -> None:
    text = plan("submit", ["model.name=vmamba_tiny_s1l8"]).text()
    assert "30.25 M parameters, 4.906 GMACs at 224 px" in text
    with pytest.raises(ConfigError, match=r"model.name=vmamba_tny: .*did you mean"):
        plan("submit", ["model.name=vmamba_tny"]).text()
