"""The parts of a Slurm job that need no Slurm: what follows an end, the batch script, presets, the snapshot."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from vmamba_dist.cluster import env, ledger, slurm, snapshot, submit
from vmamba_dist.cluster.env import SlurmStart
from vmamba_dist.cluster.executors import slurm_executor
from vmamba_dist.cluster.job import TrainJob
from vmamba_dist.cluster.ledger import Line, fruitless_starts
from vmamba_dist.cluster.requeue import Start, Verdict, begin, decide
from vmamba_dist.config import ConfigError, load, to_dict
from vmamba_dist.config.schema import LaunchConfig
from vmamba_dist.core import rundir
from vmamba_dist.train.stopping import StopRequest

ROOT = Path(__file__).resolve().parents[2]
RUNNING = slurm.JobState("RUNNING", "None", False, "main")
PREEMPTED = slurm.JobState("RUNNING", "None", True, "low")
CANCELLED = slurm.JobState("COMPLETING", "None", False, "main")
OUT_OF_TIME = slurm.JobState("COMPLETING", "TimeLimit", False, "main")
GONE = slurm.JobState("COMPLETING", "None", True, "low")


@pytest.mark.parametrize(
    ("code", "outcomes", "state", "fruitless", "expected"),
    [
        (0, [("finished", "")] * 2, RUNNING, 0, ("done", "the run is finished")),
        (1, [("finished", "")], CANCELLED, 9, ("done", "the run is finished")),
        (0, [("misused", "optim.lr=0: no")], RUNNING, 0, ("stop", "optim.lr=0: no")),
        (0, [("requeue", "")], RUNNING, 0, ("go on", "asked to stop, saved")),
        (0, [("requeue", "")], PREEMPTED, 9, ("go on", "pre-empted, saved")),
        (0, [("requeue", "")], CANCELLED, 0, ("leave", "ended from outside (Slurm's state: COMPLETING)")),
        (143, [], OUT_OF_TIME, 1, ("go on", "killed at its time limit")),
        (143, [], OUT_OF_TIME, 3, ("stop", "killed at its time limit; 3 starts in a row have brought")),
        (137, [], RUNNING, 1, ("go on", "ended with code 137 (a rank was killed by signal 9)")),
        (137, [], None, 1, ("go on", "ended with code 137 (a rank was killed by signal 9)")),
        (1, [("failed", "OSError: disk")], RUNNING, 2, ("go on", "OSError: disk")),
        (1, [("failed", "OSError: disk"), ("failed", "gloo: reset")], RUNNING, 1, ("go on", "OSError: disk")),
        (1, [("failed", "OSError: disk")], RUNNING, 3, ("stop", "OSError: disk; 3 starts in a row")),
    ],
)
def test_what_follows_an_end(
    code: int,
    outcomes: list[tuple[str, str]],
    state: slurm.JobState | None,
    fruitless: int,
    expected: tuple[str, str],
) -> None:
    found = decide(code, outcomes, state, fruitless, 0, None)
    assert found.kind == expected[0]
    assert found.why.startswith(expected[1])


def test_a_preempted_job_goes_on_by_itself_only_where_slurm_would_not_requeue_it() -> None:
    assert decide(143, [], GONE, 0, 0, None, slurm_requeues=True).kind == "leave"
    assert decide(143, [], GONE, 0, 0, None, slurm_requeues=False).kind == "go on"


def test_the_number_of_requeues_is_bounded_where_asked() -> None:
    said = [("requeue", "")]
    assert decide(0, said, RUNNING, 0, 10**6, None).kind == "go on"
    assert decide(0, said, RUNNING, 0, 1, 2).kind == "go on"
    assert decide(0, said, RUNNING, 0, 2, 2) == Verdict(
        "stop", "asked to stop, saved; launch.max_requeues=2 is reached", code=1
    )


def starts(*events: tuple[str, int] | tuple[str, int, bool]) -> list[Line]:
    """Lines of a ledger from ("begin" | "end", step[, counts])."""
    return [
        Line(event[0], "s", "1", 0, event[1], counts=event[2] if len(event) > 2 else True) for event in events
    ]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("lines", "step", "count"),
    [
        (starts(("begin", 0)), 0, 1),
        (starts(("begin", 0)), 4, 0),
        (starts(("begin", 0), ("end", 0), ("begin", 0)), 0, 2),
        (starts(("begin", 0), ("end", 0), ("begin", 0)), 8, 0),
        (starts(("begin", 0), ("end", 8), ("begin", 8), ("end", 8), ("begin", 8)), 8, 2),
        (starts(("begin", 0), ("begin", 0), ("begin", 0)), 0, 3),  # machines that went down
        (starts(("begin", 0), ("begin", 4), ("begin", 4)), 4, 2),
        (starts(("begin", 0), ("end", 0, False), ("begin", 0), ("end", 0, False), ("begin", 0)), 0, 1),
        ([], 0, 0),
    ],
)
def test_starts_without_a_new_checkpoint_are_counted(lines: list[Line], step: int, count: int) -> None:
    assert fruitless_starts(lines, step) == count


def test_a_ledger_survives_a_torn_line(tmp_path: Path) -> None:
    first, second = starts(("begin", 0), ("end", 8))
    ledger.append(tmp_path, first)
    with (tmp_path / ledger.LEDGER).open("ab") as file:
        file.write(b'\n{"event": "begin", "fol')
    ledger.append(tmp_path, second)
    assert [(line.event, line.step) for line in ledger.read(tmp_path)] == [("begin", 0), ("end", 8)]
    assert ledger.read(tmp_path / "nowhere") == []


SHOWN = """\
JobId=7 JobName=x JobState=FAILED PreemptTime=2026-11-25T01:00:00
   UserId=me(1) GroupId=me(1) MCS_label=N/A
   JobState=RUNNING Reason=None Dependency=(null)
   PreemptEligibleTime=2026-11-25T01:00:00 PreemptTime={time}
   Partition=low AllocNode:Sid=host:1
   Command=/tmp/x
"""


def test_a_jobs_name_does_not_pass_for_its_state() -> None:
    assert slurm.parse_job(SHOWN.format(time="None")) == slurm.JobState("RUNNING", "None", False, "low")
    state = slurm.parse_job(SHOWN.format(time="2026-11-25T02:00:00"))
    assert state is not None
    assert state.preempted
    assert slurm.parse_job("slurm_load_jobs error: Invalid job id specified") is None


def test_ranks_meet_at_the_first_node_at_a_port_of_this_start(monkeypatch: pytest.MonkeyPatch) -> None:
    ports = set()
    monkeypatch.setenv("MASTER_ADDR", "")
    monkeypatch.setenv("MASTER_PORT", "")
    for job, restart in (("12", 0), ("13", 0), ("12", 1), ("4294901759", 250)):
        assert env.slurm_rendezvous(SlurmStart(job, job, restart, "a[1-2]"), "a1") == "env://"
        assert os.environ["MASTER_ADDR"] == "a1"
        ports.add(int(os.environ["MASTER_PORT"]))
    assert len(ports) == 4
    assert all(20000 <= port < 30000 for port in ports)


def test_a_signal_that_came_while_it_was_blocked_is_handled_by_the_trainer() -> None:
    before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    try:
        # To this thread: one of a process's other threads would take what is meant for the process, and ignore it.
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR2)
        with StopRequest().listening() as stop:
            assert stop.signal == signal.SIGUSR2
    finally:
        signal.signal(signal.SIGUSR2, before)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])


def test_a_question_that_dies_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an answer a cancelled job would be taken for one that nobody has ended, and go on."""
    program = tmp_path / "scontrol"
    answer = "JobId=7 JobName=a\n   JobState=CANCELLED Reason=None\n"
    program.write_text(
        f"#!/bin/sh\n[ -e '{tmp_path}/asked' ] || {{ : >'{tmp_path}/asked'; kill -PIPE $$; }}\necho '{answer}'"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    state = slurm.job_state("7")
    assert (tmp_path / "asked").exists()
    assert state is not None
    assert state.state == "CANCELLED"


def test_starts_of_jobs_submitted_anew_count(tmp_path: Path) -> None:
    """Where requeueing is forbidden, each start is a job's first, as Slurm sees it."""
    words = [f"run.dir={tmp_path}", "launch.max_requeues=1"]
    job = TrainJob(to_dict(load(words)))
    for number, code in (("14", 0), ("15", 0), ("16", 1)):
        start = Start(SlurmStart(number, number, 0, "node1"), tmp_path / "slurm" / "submission", job)
        assert begin(start) == code
    assert start.restarts == 2


def test_an_array_element_is_known_by_both_of_its_numbers() -> None:
    variables = {
        "SLURM_JOB_ID": "14",
        "SLURM_ARRAY_JOB_ID": "12",
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_RESTART_COUNT": "2",
    }
    assert env.slurm_start(variables) == SlurmStart("14", "12_3", 2, "")
    assert rundir.job_id(variables) == "12_3"  # what people give to scancel
    assert rundir.job_id({"SLURM_JOB_ID": "14"}) == "14"
    assert env.slurm_start({"SLURM_JOB_ID": "14"}) == SlurmStart("14", "14", 0, "")
    assert env.slurm_start({}) is None
    assert (
        env.slurm_start({"SLURM_JOB_ID": "14", "SUBMITIT_EXECUTOR": "local"}) is None
    )  # inside an allocation


def test_auto_is_slurm_where_only_slurm_knows_what_is_asked() -> None:
    assert not LaunchConfig().on_slurm
    assert not LaunchConfig(time_limit_min=60, gpus_per_node=2).on_slurm
    assert LaunchConfig(nodes=2).on_slurm
    assert LaunchConfig(partition="gpu").on_slurm
    assert not LaunchConfig(partition="gpu", cluster="local").on_slurm
    assert LaunchConfig(cluster="slurm").on_slurm
    for key, value in SLURMS.items():
        assert LaunchConfig(**{key: value}).on_slurm


SLURMS: dict[str, Any] = {"mem_gb": 4.0, "cpus_per_task": 2, "max_requeues": 0, "setup": "module load x"}


@pytest.mark.parametrize("cluster", ["local", "debug"])
@pytest.mark.parametrize("key", SLURMS)
def test_what_only_slurm_reads_is_refused_by_name_where_there_is_none(key: str, cluster: Any) -> None:
    with pytest.raises(ConfigError, match=f"launch.{key}=.*launch.cluster={cluster} does not read it"):
        LaunchConfig(cluster=cluster, **{key: SLURMS[key]})
    assert not LaunchConfig(cluster=cluster, preset="ours", **{key: SLURMS[key]}).on_slurm


def test_a_time_limit_holds_here_and_not_in_this_process() -> None:
    assert not LaunchConfig(cluster="local", time_limit_min=5).on_slurm
    with pytest.raises(ConfigError, match=r"launch\.time_limit_min=5: .*debug does not read it"):
        LaunchConfig(cluster="debug", time_limit_min=5)


def test_a_limit_that_leaves_no_time_is_refused_with_the_numbers(tmp_path: Path) -> None:
    def plan(*words: str) -> None:
        ours = [f"run.dir={tmp_path}", "data.train=elsewhere", "launch.cluster=slurm"]
        submit.for_slurm(submit.plan("submit", [*ours, *words]))

    for words, says in (
        (
            ["launch.time_limit_min=4"],
            "a start takes 60 s.*=120 s \\(two steps and the save\\) before.*240 s of 240 s.*use 5 minutes or more",
        ),
        (
            ["launch.time_limit_min=9", "launch.signal_delay_s=600"],
            "720 s of 540 s without training; use 13 min",
        ),
        (
            ["launch.signal_delay_s=9"],
            r"signal_delay_s=9: two steps and a save take longer.*use 10 s or more",
        ),
    ):
        with pytest.raises(ConfigError, match=says):
            plan(*words)
    plan("launch.time_limit_min=5")


@pytest.mark.parametrize("key", ["name", "partition", "account", "qos", "constraint", "exclude"])
@pytest.mark.parametrize(
    "text", ["a\ntouch pwned\n", "a\\b", "a\x1b[31m"], ids=["break", "backslash", "escape"]
)
def test_a_line_of_the_script_stays_one_line(key: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"launch.{key}=.*leave out line breaks"):
        LaunchConfig(**{key: text})


@pytest.mark.parametrize("folder", ["a%j", "a:b", "a\\b", "a\nb"])
def test_a_path_that_slurm_would_read_otherwise_is_refused(folder: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.dir: Slurm cannot write below"):
        slurm_executor(tmp_path / folder, LaunchConfig())


def test_what_a_user_wrote_is_one_quoted_word_and_setup_is_shell_as_written(tmp_path: Path) -> None:
    evil = """it's "a" $(touch pwned) `touch pwned`; touch pwned #"""
    folder = tmp_path / evil
    keys = ("name", "partition", "account", "qos", "constraint", "exclude")
    launch = LaunchConfig(**dict.fromkeys(keys, evil), setup="echo \"two  words\" '$(x)'\nexit 3")  # type: ignore[arg-type]
    text = slurm_executor(folder, launch, code=folder / "code").script()
    options = {
        line.partition("=")[0]: line.partition("=")[2]
        for line in text.splitlines()
        if line.startswith("#SBATCH")
    }
    for option in ("job-name", "partition", "account", "qos", "constraint", "exclude"):
        assert shlex.split(options[f"#SBATCH --{option}"]) == [evil]

    # bash runs it up to setup's own exit; the trap asks Python, which is not inside a job and says so.
    script = tmp_path / "script.sh"
    script.write_text(text)
    outside = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    done = subprocess.run(
        ["bash", str(script)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
        check=False,
        env=outside,
    )
    assert done.stdout == "two  words $(x)\n"
    assert "not inside a Slurm job" in done.stderr
    assert not list(tmp_path.rglob("pwned"))
    assert "--cpus-per-task=1 --kill-on-bad-exit=1" in text


def test_a_dry_run_shows_the_script_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        f"run.dir={tmp_path / 'run'}",
        "data.train=elsewhere",
        "launch.nodes=4",
        "launch.gpus_per_node=8",
        "launch.partition=gpu",
    ]
    words += [
        "launch.mem_gb=1.5",
        "launch.time_limit_min=720",
        "data.workers=5",
        "launch.setup=module load x",
    ]
    assert submit.main([*words, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for part in (
        "4 nodes of Slurm, 8 processes each, 32 GPUs, 720 minutes a start",
        "30.25 M parameters",
        "#SBATCH --nodes=4\n",
        "#SBATCH --ntasks-per-node=8\n",
        "#SBATCH --gpus-per-node=8\n",
        "#SBATCH --cpus-per-task=6\n",
        "#SBATCH --mem=1536M\n",
        "#SBATCH --time=720\n",
        "#SBATCH --signal=USR2@120\n",
        "#SBATCH --partition=gpu\n",
        "#SBATCH --requeue\n",
        "\nmodule load x\n",
        "trap vmamba_after EXIT",
    ):
        assert part in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("model.name=vmamba_tny", "model.name"),
        ("data.train=''", "data.train is not set"),
        ("data.image_size=50", "data.image_size=50"),
        ("data.global_batch=20", "data.global_batch=20 does not divide over 16 ranks"),
        ("parallel.shard_size=3", "parallel.shard_size=3 do not make up the 16 ranks"),
    ],
)
def test_what_every_start_would_refuse_is_not_queued(tmp_path: Path, word: str, says: str) -> None:
    words = [f"run.dir={tmp_path / 'run'}", "data.train=elsewhere", "parallel.engine=fsdp"]
    words += ["launch.nodes=2", "launch.gpus_per_node=8"]
    with pytest.raises(ConfigError, match=says):
        submit.main([*words, word])
    assert not (tmp_path / "run").exists()


def test_without_a_limit_the_partitions_holds(tmp_path: Path) -> None:
    assert "--time" not in slurm_executor(tmp_path, LaunchConfig()).script()


def test_a_preset_lies_below_the_config_and_the_command_line(tmp_path: Path) -> None:
    preset = tmp_path / "ours.yaml"
    preset.write_text(
        "launch: {partition: gpu, gpus_per_node: 4, cpus_per_task: 9, setup: 'module load a'}\n"
    )
    config = tmp_path / "config.yaml"
    config.write_text(f"launch: {{preset: {preset}, cpus_per_task: 7}}\n")
    launch = load([f"config={config}", "launch.gpus_per_node=2"]).launch
    assert (launch.partition, launch.gpus_per_node, launch.cpus_per_task) == ("gpu", 2, 7)
    assert load(["launch.preset=cpu"]).launch.on_slurm
    preset.write_text("launch: {partition: gpu}\noptim: {lr: 1}\n")
    for word, says in (
        (str(preset), "sets optim; a preset sets launch"),
        ("nowhere", "launch.preset=nowhere: .*one of a100x4, cpu, h100x8$"),
    ):
        with pytest.raises(ConfigError, match=says):
            load([f"launch.preset={word}"])


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "cluster").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_shipped_preset_loads(path: Path, tmp_path: Path) -> None:
    launch = load([f"launch.preset={path.stem}"]).launch
    assert launch.on_slurm
    assert "#SBATCH" in slurm_executor(tmp_path, launch).script()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with something of each kind."""
    root = tmp_path / "checkout"
    (root / "kernels").mkdir(parents=True)
    files = {
        "a.py": "a = 1\n",
        "kernels/k.py": "k = 1\n",
        "gone.py": "",
        "ä b.py": "",
        ".gitignore": "data/\n",
    }
    for name, text in files.items():
        (root / name).write_text(text)
    (root / "link").symlink_to("kernels")
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "all")
    return root


def git(root: Path, *words: str) -> str:
    line = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b", *words]
    return subprocess.run(line, check=True, capture_output=True, text=True).stdout


def test_a_snapshot_is_what_git_tracks_and_does_not_ignore(checkout: Path) -> None:
    clean = snapshot.take_checkout(checkout, checkout / "data" / "code")
    assert not json.loads((clean / snapshot.RECORD).read_text())["changed"]
    (checkout / "a.py").write_text("a = 2\n")
    (checkout / "new.py").write_text("n = 1\n")
    (checkout / "gone.py").unlink()
    (checkout / "data" / "images").write_bytes(bytes(2**20))
    code = snapshot.take_checkout(checkout, checkout / "data" / "code", limit_mib=0.5)
    names = {
        str(path.relative_to(code)) for path in code.rglob("*") if not path.is_dir() or path.is_symlink()
    }
    assert names == {
        "a.py",
        "kernels/k.py",
        "ä b.py",
        ".gitignore",
        "link",
        "new.py",
        snapshot.RECORD,
        snapshot.DIFF,
    }
    assert (code / "a.py").read_text() == "a = 2\n"
    assert (code / "link" / "k.py").read_text() == "k = 1\n"
    record = json.loads((code / snapshot.RECORD).read_text())
    assert record["commit"] == git(checkout, "rev-parse", "HEAD").strip()
    assert record["changed"]
    assert "+a = 2" in (code / snapshot.DIFF).read_text()

    assert clean != code
    assert (clean / "a.py").read_text() == "a = 1\n"  # an earlier submission's stays as it was
    assert snapshot.take_checkout(checkout, checkout / "data" / "code") == code
    assert set((checkout / "data" / "code").iterdir()) == {clean, code}  # nothing half made is left


def test_a_snapshot_in_the_checkout_does_not_hold_itself(checkout: Path) -> None:
    first = snapshot.take_checkout(checkout, checkout / "run" / "code")
    assert snapshot.take_checkout(checkout, checkout / "run" / "code") == first


def test_a_snapshot_that_is_too_large_names_what_makes_it_so(checkout: Path) -> None:
    (checkout / "weights.bin").write_bytes(bytes(3 * 2**20))
    with pytest.raises(
        ConfigError, match=r"is 3\.0 MiB, a snapshot holds 2 MiB; .*weights\.bin \(3\.0 MiB\).*gitignore"
    ):
        snapshot.take_checkout(checkout, checkout / "code", limit_mib=2)
    assert not (checkout / "code").exists()


def test_installed_packages_are_copied_where_there_is_no_checkout(tmp_path: Path) -> None:
    site = tmp_path / "site-packages"
    for package in ("vmamba_dist", "kernels/vmamba_kernels"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, site / Path(package).name, ignore=ignore)
    code = "from pathlib import Path; from vmamba_dist.cluster import snapshot; print(snapshot.take(Path('code')))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(site)},
    )
    taken = tmp_path / done.stdout.strip()
    assert (taken / "vmamba_kernels/__init__.py").is_file()
    assert (taken / "vmamba_dist/configs/quickstart.yaml").is_file()
    record = json.loads((taken / snapshot.RECORD).read_text())
    assert (record["source"], record["commit"]) == (str(site), None)


def test_a_job_finds_the_snapshot_before_the_folder_it_starts_in_and_what_is_installed(
    tmp_path: Path,
) -> None:
    """As the batch script starts Python, in the checkout that this environment is installed from, kernels too."""
    code = snapshot.take(tmp_path / "code")
    script = slurm_executor(tmp_path / "slurm", LaunchConfig(), code=code).script().splitlines()
    path = next(line for line in script if line.startswith("export PYTHONPATH="))
    names = ("vmamba_dist.cluster.job", "vmamba_kernels")
    ask = f"from importlib.util import find_spec; print(*(find_spec(name).origin for name in {names}))"
    line = f"{path}\n{shlex.quote(sys.executable)} -P -c {shlex.quote(ask)}"
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, cwd=ROOT, check=True, timeout=60
    )
    found = [Path(name) for name in done.stdout.split()]
    assert found == [code / "vmamba_dist/cluster/job.py", code / "kernels/vmamba_kernels/__init__.py"]
