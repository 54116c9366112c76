"""What a user meets on the way to Slurm and back: refusals, a snapshot, a follower, an end that stays one."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distributed.micro import metrics
from slurm import lab
from slurm.lab import ROOT, STEPS, SUBMIT, Job, restarts, run_submit, submit, wait_until
from vmamba_dist.cluster import executors, slurm, snapshot
from vmamba_dist.cluster.job import Report, TrainJob
from vmamba_dist.config import load, to_dict

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]
ONE = ["launch.nodes=1", "launch.tasks_per_node=1", "launch.cluster=slurm"]


def follow(words: list[str], run: Path) -> tuple[Job, subprocess.Popen[bytes], Path]:
    """Submit a run and stay with it; return its job, the follower and the file that it shows everything in."""
    shown = run.with_suffix(".shown")
    with shown.open("wb") as out:
        line = [*SUBMIT, *words, f"run.dir={run}", "--follow"]
        follower = subprocess.Popen(line, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT)
    (number,) = wait_until(
        lambda: re.findall(r"^job +(\d+),", shown.read_text(), re.MULTILINE), "the job to be submitted"
    )
    return Job(number, run, shown.read_text()), follower, shown


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["launch.partition=nowhere"], "invalid partition specified: nowhere"),
        (["launch.partition=members"], "Invalid account"),
        (["launch.partition=members", "launch.account=arts"], "Invalid account"),
        (["launch.time_limit_min=121"], r"launch\.time_limit_min=121: .* allows 120 minutes"),
        (
            ["launch.time_limit_min=121", "launch.partition=main,low"],
            r"partition main,low allows 120 minutes",
        ),
        (["launch.time_limit_min=4"], r"launch\.time_limit_min=4: .*240 s of 240 s .*use 5 minutes"),
        (["launch.nodes=5", "data.global_batch=40"], "Node count"),
        (["launch.constraint=moon"], "feature"),
        (["launch.exclude=nobody[1-2]"], "node name"),
        (["launch.mem_gb=9999"], "[Mm]emory|node configuration"),
        (["optim.lrr=1"], r"did you mean optim\.lr"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_run_is_refused_in_one_line_with_nothing_queued(
    words: list[str], tmp_path: Path, more: list[str], says: str
) -> None:
    done = run_submit([*words, f"run.dir={tmp_path / 'run'}", *more])
    assert done.returncode == 2
    assert re.search(says, done.stderr), done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
    assert lab.slurm("squeue", "-h") == ""
    assert not (tmp_path / "run" / "slurm").exists()  # which would make it a run


def test_a_mistake_that_only_the_job_sees_ends_it_and_its_follower_and_gpus_are_given(
    words: list[str], tmp_path: Path
) -> None:
    """The GPUs of this cluster are declared, not there: a rank is given two, and finds none."""
    asked = ["launch.tasks_per_node=null", "launch.gpus_per_node=2", "launch.cpus_per_task=3", "--follow"]
    done = run_submit([*words, f"run.dir={tmp_path / 'run'}", *asked], limit_s=lab.START_S)
    assert done.returncode == 2
    job = Job(re.findall(r"^job +(\d+),", done.stdout, re.MULTILINE)[0], tmp_path / "run", done.stdout)
    job.await_state("FAILED")
    assert job.field("ExitCode") == "2:0"
    assert restarts(job) == 0
    ((verdict, why),) = job.ends
    assert verdict == "stop"
    assert "torch sees no CUDA device" in why
    assert done.stderr == f"vmamba: job {job.id} has ended: stop: {why}; log: {job.run / 'train.log'}\n"
    for rank in range(4):
        assert "3 cores, GPUs 0,1;" in job.output(rank)
    assert f"vmamba: stop: {why}" in job.output(0, "err")
    assert {(kind, report.exit_code) for kind, report in job.results()} == {("success", 2)}


def test_what_fails_three_times_without_progress_stops_with_the_reason(
    words: list[str], tmp_path: Path
) -> None:
    (tmp_path / "run" / "bad.jsonl").mkdir(parents=True)  # a folder where a file should be written
    job = submit(words, tmp_path / "run", *ONE)
    job.await_end("FAILED")
    assert restarts(job) == 2
    assert [verdict for verdict, _ in job.ends] == ["go on", "go on", "stop"]
    assert "IsADirectoryError" in job.ends[-1][1]
    assert "3 starts in a row have brought no new checkpoint" in job.ends[-1][1]
    assert job.results() == [("error", job.ends[-1][1])]  # a client of submitit's does not wait for ever


def test_a_setup_that_ends_the_script_stops_after_three_starts(words: list[str], tmp_path: Path) -> None:
    """Its starts end before one has begun: where those did not count, it was requeued for ever."""
    job = submit(words, tmp_path / "run", *ONE, "launch.setup=exit 7")
    job.await_end("FAILED")
    assert restarts(job) == 2
    assert [line.event for line in job.starts] == ["begin", "end"] * 3
    assert [verdict for verdict, _ in job.ends] == ["go on", "go on", "stop"]
    assert job.ends[-1][1].startswith("launch.setup ended the script with code 7, before training; 3 starts")
    assert job.field("ExitCode") == "7:0"


def test_no_more_requeues_than_allowed_and_the_same_command_goes_on(words: list[str], tmp_path: Path) -> None:
    job = submit(words, tmp_path / "run", *ONE, "launch.max_requeues=0")
    with job.frozen(5):
        lab.slurm("scancel", "--signal=USR2", job.id)
    job.await_end("FAILED")
    assert job.ends == [("stop", "asked to stop, saved; launch.max_requeues=0 is reached")]
    stopped = job.saved[-1]
    (again,) = re.findall(r"^resume +(/.* submit .*)$", job.said, re.MULTILINE)
    assert f"run.dir={tmp_path / 'run'}" in again
    bare = {**os.environ, "PATH": "/usr/bin:/bin"}  # without the environment's own programs
    told = subprocess.run(["sh", "-c", again], capture_output=True, text=True, check=True, env=bare).stdout
    later = Job(re.findall(r"^job +(\d+),", told, re.MULTILINE)[0], job.run, told)
    later.await_end()
    assert later.begun == [1, stopped + 1]
    assert [line["step"] for line in metrics(later.run)] == list(range(1, STEPS + 1))


def test_where_requeueing_is_forbidden_the_job_submits_itself_anew(
    words: list[str], whole: Job, tmp_path: Path
) -> None:
    """And a follower goes with it, though the heir has begun before the follower sees the job's end."""
    job, follower, shown = follow(words, tmp_path / "run")
    lab.slurm("scontrol", "update", f"JobId={job.id}", "Requeue=0")
    with job.frozen(9) as ranks:
        os.kill(ranks[1], signal.SIGTERM)
    job.await_end("FAILED")
    (line,) = [line for line in job.starts if line.event == "resubmitted"]
    assert line.successor != job.id
    heir = Job(line.successor, job.run, "")
    heir.await_end()
    assert follower.wait(timeout=60) == 0, shown.read_text()
    assert f"job {job.id} goes on as job {heir.id}\n" in shown.read_text()
    assert "it said nothing" not in shown.read_text()
    assert metrics(job.run) == metrics(whole.run)
    assert len(job.begun) == 2
    assert job.begun[1] == job.starts[1].step + 1
    assert job.ends[-1][0] == "done"


def test_where_nothing_can_be_asked_of_slurm_the_command_is_left(words: list[str], tmp_path: Path) -> None:
    """A node with srun alone, as some sites have them."""
    tools = tmp_path / "only srun"
    tools.mkdir()
    (tools / "srun").symlink_to(str(shutil.which("srun")))
    job = submit(words, tmp_path / "run", *ONE, f"launch.setup=PATH='{tools}'", cwd=tmp_path)
    with job.frozen(5) as ranks:
        os.kill(ranks[0], signal.SIGUSR2)
    job.await_end("FAILED")
    verdict, why = job.ends[-1]
    assert verdict == "stop"
    assert "no scontrol on this machine" in why
    (command,) = re.findall(r"to go on: (cd .*)$", why)
    assert re.match(rf"cd {tmp_path} && /.* submit data\.train=", command)
    assert f"vmamba: {why}" in job.output(0, "err")
    assert job.results() == [("error", why)]


def test_a_follower_leaves_the_job_alone_and_a_cancelled_job_stays_cancelled(
    words: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    line = [
        *SUBMIT,
        *words,
        f"run.dir={run}",
        *ONE,
        "--follow",
        "schedule.epochs=50",
        "telemetry.log_every_steps=1",
    ]
    shown = tmp_path / "shown"
    with shown.open("wb") as out:
        # As in a terminal: whoever runs the tests in a shell's background has Ctrl-C ignored, and so would this.
        follower = subprocess.Popen(
            line,
            stdout=out,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        wait_until(lambda: " step 5/" in shown.read_text(), "progress")
        follower.send_signal(signal.SIGINT)
        assert follower.wait(timeout=60) == 0
    finally:
        follower.kill()
        follower.wait()
    text = shown.read_text()
    (number,) = re.findall(r"^job +(\d+),", text, re.MULTILINE)
    job = Job(number, run, text)
    assert text.endswith(f"job {number} goes on; to stop it: scancel {number}\n")
    assert job.state == "RUNNING"
    for part in (f"run      {run}", str(run / "train.log"), f"tail -F {run}/train.log", f"scancel {number}"):
        assert part in text

    second = submit(words, run, *ONE, "schedule.epochs=50")  # while the first one has the run
    second.await_end("FAILED")
    assert second.field("ExitCode") == "2:0"
    assert f"in use by attempt 1 (host {job.field('BatchHost')}" in second.output(0, "err")

    lab.slurm("scancel", number)
    job.await_end("CANCELLED")
    wait_until(lambda: not lab.slurm("squeue", "-h"), "the job to leave")
    assert job.state == "CANCELLED"
    verdict, why = job.ends[-1]
    assert verdict == "leave"
    assert why.startswith("ended from outside")
    assert job.saved[-1] == job.steps  # it saved before it went


def test_a_controller_that_is_away_for_a_while_ends_nothing(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is away a start ends, and a follower asks: the job is requeued, and the follower stays.

    Their scontrol has short waits: with the cluster's own a question takes 40 s to fail.
    """
    tools = tmp_path / "tools"
    tools.mkdir()
    conf = Path(os.environ["SLURM_CONF"]).read_text()
    hasty = re.sub(r"(?m)^(MessageTimeout|TCPTimeout|SlurmctldTimeout)=.*$", r"\1=2", conf)
    (tools / "slurm.conf").write_text(hasty)
    scontrol = tools / "scontrol"
    scontrol.write_text(
        f"#!/bin/sh\nSLURM_CONF='{tools / 'slurm.conf'}' exec {shutil.which('scontrol')} \"$@\"\n"
    )
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    job, follower, shown = follow(
        [*words, *ONE, f"launch.setup=export PATH='{tools}':$PATH"], tmp_path / "run"
    )
    monkeypatch.undo()
    with job.frozen(5) as ranks:
        lab.cluster("stop-controller")
        os.kill(ranks[0], signal.SIGUSR2)
    try:
        wait_until(lambda: "Slurm does not answer" in job.output(0, "err"), "the batch script to ask in vain")
        time.sleep(20)  # longer than three tries
        assert not job.ends
        assert follower.poll() is None
    finally:
        lab.cluster("start-controller")
    job.await_end()
    assert restarts(job) == 1
    assert job.ends[0] == ("go on", "asked to stop, saved")
    assert follower.wait(timeout=60) == 0, shown.read_text()
    assert (
        "Slurm does not answer, asking again (slurm_load_jobs error: Unable to contact" in shown.read_text()
    )
    assert slurm.job_state("99999") is None


def test_words_reach_slurm_as_they_are_written(words: list[str], digits: Path, tmp_path: Path) -> None:
    folder = tmp_path / """it's "a" $(touch pwned) `touch pwned` ; touch pwned & dir"""
    data = folder / "the $HOME of 'data'"
    shutil.copytree(digits, data)
    name = """my 'job' "x" $(touch pwned); touch pwned; echo"""
    seen = tmp_path / "seen"
    setup = f"""printf '%s\\n' "a  'b'" '$(touch pwned)' "$((6 * 7))" > '{seen}'"""
    job = submit(
        words, folder / "run", *ONE, f"launch.name={name}", f"data.train={data}", f"launch.setup={setup}",
        "run.max_steps=2", cwd=tmp_path,
    )  # fmt: skip
    job.await_end()
    assert seen.read_text().splitlines() == ["a  'b'", "$(touch pwned)", "42"]
    assert lab.slurm("scontrol", "show", "job", job.id).splitlines()[0] == f"JobId={job.id} JobName={name}"
    assert job.steps == 2
    assert not list(tmp_path.rglob("pwned"))
    assert not (ROOT / "pwned").exists()


def test_a_queued_job_runs_the_code_that_was_submitted(words: list[str], tmp_path: Path) -> None:
    """Not the checkout as it is edited afterwards, nor the one that the environment is installed from."""
    copy = snapshot.take_checkout(ROOT, tmp_path / "copy")
    git = ["git", "-C", str(copy), "-c", "user.name=a", "-c", "user.email=a@b"]
    for line in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all"]):
        subprocess.run([*git, *line], check=True)
    commit = subprocess.run(
        [*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()
    kernels, ours = copy / "kernels/vmamba_kernels/__init__.py", copy / "vmamba_dist/train/__init__.py"
    before = {path: path.read_text() for path in (kernels, ours)}
    kernels.write_text(f"{before[kernels]}\nprint('kernels from', __file__, flush=True)\n")
    ours.write_text(f"{before[ours]}\nimport vmamba_dist.new_file\n")
    (copy / "vmamba_dist/new_file.py").write_text("print('not committed', flush=True)\n")

    run = tmp_path / "run"
    path = f"{copy}{os.pathsep}{copy / 'kernels'}"
    lab.slurm("scontrol", "update", "PartitionName=main", "State=DOWN")
    try:
        done = subprocess.run(
            [sys.executable, str(copy / "launch/submit.py"), *words, *ONE, f"run.dir={run}", "run.max_steps=2"],
            capture_output=True, text=True, timeout=120, check=True, cwd=copy, env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
        for broken in (kernels, ours):
            broken.write_text("raise RuntimeError('edited after submission')\n")
    finally:
        lab.slurm("scontrol", "update", "PartitionName=main", "State=UP")
    (number,) = re.findall(r"^job +(\d+),", done.stdout, re.MULTILINE)
    job = Job(number, run, done.stdout)
    job.await_end()
    (code,) = (run / "code").iterdir()
    said = job.output()
    assert f"kernels from {code}/kernels/vmamba_kernels/__init__.py" in said
    assert f"code {code}\n" in said
    assert "not committed" in said
    assert f'"commit": "{commit}"' in (code / snapshot.RECORD).read_text()
    assert f'"commit": "{commit}"' in (run / "environment.json").read_text()
    assert "+import vmamba_dist.new_file" in (code / snapshot.DIFF).read_text()


def test_an_element_of_an_array_is_requeued_alone(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in {"ARRAY_JOB_ID": "99", "ARRAY_TASK_ID": "5", "RESTART_COUNT": "7"}.items():
        monkeypatch.setenv(f"SLURM_{key}", value)  # submitted from inside another job
    runs = [tmp_path / "a", tmp_path / "b"]
    configs = [load([*words, *ONE, f"run.dir={run}"]) for run in runs]
    executor = executors.slurm_executor(tmp_path / "array" / "1", configs[0].launch, parallelism=2)
    queued = executors.submit(executor, [TrainJob(to_dict(config)) for config in configs])
    first, last = (Job(job.job_id, run, "") for job, run in zip(queued, runs, strict=True))
    assert [first.id[-2:], last.id[-2:]] == ["_0", "_1"]
    with last.frozen(5):  # whose own number is that of the whole array
        lab.slurm("scancel", "--signal=USR2", last.id)
    for job in (first, last):
        job.await_end()
    assert [len(job.begun) for job in (first, last)] == [1, 2]
    assert metrics(runs[0]) == metrics(runs[1])
    assert {job.result() for job in queued} == {Report(0)}
