"""Which submitit executor runs a job, and with what.

Law: the executor is named, never guessed: submitit's own choice takes Slurm wherever `srun` is on PATH. What a user
wrote stands in a batch script as one quoted word; only launch.setup is shell, and runs as it is written, once.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from io import StringIO
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from vmamba_dist.cluster import slurm
from vmamba_dist.config.schema import ConfigError, LaunchConfig

_NO_LIMIT_MIN = 10 * 365 * 24 * 60  # submitit wants a number


def local_executor(folder: Path, launch: LaunchConfig) -> submitit.LocalExecutor:
    """An executor that starts `launch.tasks` processes here and logs into `folder`."""
    executor = submitit.LocalExecutor(folder=folder)
    limit_min = launch.time_limit_min or _NO_LIMIT_MIN
    executor.update_parameters(
        nodes=launch.nodes,
        tasks_per_node=launch.tasks,
        timeout_min=limit_min,
        signal_delay_s=min(launch.signal_delay_s, 60 * limit_min // 5),  # two steps and a save
    )
    return executor


class SlurmExecutor(submitit.SlurmExecutor):
    """submitit's, made where there is no Slurm too: a dry run shows its script anywhere."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def script(self) -> str:
        """The batch script of one job."""
        return str(self._make_submission_file_text(self._submitit_command_str, "dry"))


def slurm_executor(
    folder: Path, launch: LaunchConfig, *, code: Path | None = None, parallelism: int = 256
) -> SlurmExecutor:
    """An executor that submits to Slurm; `folder` (not there yet, shared by all nodes) takes its files.

    code: a snapshot (see snapshot.py) that the job's Python finds before anything installed. parallelism: how many
    elements of an array run at once. Raises ConfigError for a path that a batch script cannot hold.
    """
    check_path(folder)
    optional: dict[str, Any] = {
        "partition": launch.partition,
        "account": launch.account,
        "qos": launch.qos,
        "constraint": launch.constraint,
        "exclude": launch.exclude,
        "gpus_per_node": launch.gpus_per_node,
        "mem": f"{round(launch.mem_gb * 1024)}M" if launch.mem_gb else None,
    }
    cpus = launch.cpus_per_task or 1
    executor = SlurmExecutor(folder=folder, python=_python())
    executor.update_parameters(
        job_name=launch.name,
        nodes=launch.nodes,
        ntasks_per_node=launch.tasks,
        cpus_per_task=cpus,
        signal_delay_s=launch.signal_delay_s,
        array_parallelism=parallelism,
        setup=_setup(folder, launch, code),
        # Since 22.05 srun takes no cores from sbatch; and a rank that is gone must end the others, who may hang.
        srun_args=[f"--cpus-per-task={cpus}", "--kill-on-bad-exit=1"],
        additional_parameters={"requeue": True},
        # submitit gives every job five minutes unless told; without a limit of ours the partition's holds.
        time=launch.time_limit_min,
        wckey=None,
        **{key: value for key, value in optional.items() if value},
    )
    return executor


def submit(executor: SlurmExecutor, jobs: Sequence[Callable[[], Any]]) -> list[submitit.Job[Any]]:
    """Queue one job, or several as an array.

    Raises ConfigError with Slurm's own words where it refuses; then nothing of them is left, on the disk neither.
    """
    try:
        return _submit(executor, jobs)
    except ConfigError:
        shutil.rmtree(executor.folder, ignore_errors=True)
        with suppress(OSError):  # not empty, or never made
            executor.folder.parent.rmdir()  # RUN/slurm alone would look like a run
        raise


def _submit(executor: SlurmExecutor, jobs: Sequence[Callable[[], Any]]) -> list[submitit.Job[Any]]:
    if slurm.call(["sbatch", "--version"]) is None:
        raise ConfigError(
            "launch.cluster=slurm, or auto beside a key of Slurm's: there is no sbatch on this machine; use a login "
            "node, or launch.cluster=local without these keys"
        )
    try:
        # submitit prints what sbatch says when it fails, and raises it too: it is told once, below.
        with _outside_any_job(), redirect_stderr(StringIO()), executor.batch():  # several jobs are one array
            return [executor.submit(job) for job in jobs]
    except (FailedJobError, FailedSubmissionError) as error:
        told = "\n".join(line for line in str(error).splitlines() if line.startswith("sbatch:"))
        raise ConfigError(f"Slurm refused the job: {slurm.complaint(told or str(error))}") from error


@contextmanager
def _outside_any_job() -> Iterator[None]:
    before = dict(os.environ)
    for key in before.keys() - slurm.without_job(before).keys():
        del os.environ[key]
    try:
        yield
    finally:
        os.environ.update(before)


def check_path(folder: Path) -> None:
    """Raise ConfigError for a path with what Slurm, a batch script or PYTHONPATH would read otherwise."""
    if not str(folder).isprintable() or any(c in str(folder) for c in "%\\:"):
        raise ConfigError(
            f"run.dir: Slurm cannot write below {str(folder)!r}; use a path without '%', ':', backslashes and "
            "control characters"
        )


def _python() -> str:
    # -P: `-m` would put the folder of the submission, mostly a checkout, before the snapshot.
    return f"{shlex.quote(sys.executable)} -P"


def _setup(folder: Path, launch: LaunchConfig, code: Path | None) -> list[str]:
    """The batch script's lines before srun: what follows the end, the user's own, and a look at what went before."""
    after = f"{_python()} -m vmamba_dist.cluster.requeue"
    place = shlex.quote(str(folder.absolute()))
    path = []
    if code is not None:
        first = ":".join(str(place) for place in (code, code / "kernels"))
        path = [f'export PYTHONPATH={shlex.quote(first)}"${{PYTHONPATH:+:$PYTHONPATH}}"']
    deaf = ["trap '' TERM USR2 HUP INT # a requeue ends every process of the job, these too", *path]
    traps = ["trap vmamba_after EXIT", "trap vmamba_heard TERM", "trap heard=1 USR2 HUP"]
    return [
        "vmamba_after() { # the last word: done, go on, or stop and say why",
        "  local code=$?",
        *(f"  {line}" for line in deaf),
        f'  {after} end {place} "$code"',
        "  exit $?",
        "}",
        "vmamba_heard() { # the word before SIGKILL, which leaves no last one where a rank hangs",
        "  heard=1",
        "  (",
        *(f"    {line}" for line in deaf),
        f"    {after} heard {place}",
        "  )",
        "}",
        "srun() { # in the background: bash is deaf while something runs in front; signals end a wait, not srun",
        '  command srun "$@" &',
        "  local pid=$! code=127 last",
        "  while :; do",
        '    heard= && wait "$pid"; last=$?',
        '    [ "$last" = 127 ] || code=$last',
        '    if [ -z "$heard" ] || [ "$last" = 127 ]; then return "$code"; fi',
        "  done",
        "}",
        *traps,
        *launch.setup.split("\n"),
        *path,
        *traps,  # again: setup may have set its own
        f"{after} begin {place} || exit",
    ]


@contextmanager
def apart_from_terminal(log: Path) -> Iterator[None]:
    """Have processes started inside ignore Ctrl-C and hang-up, read nothing and write to `log`.

    They inherit dispositions and descriptors; with ours they would end with the terminal, or keep a pipe open
    that somebody reads to its end.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    ours = [os.dup(descriptor) for descriptor in range(3)]
    try:
        with Path(os.devnull).open("rb") as nothing, log.open("ab") as file:
            os.dup2(nothing.fileno(), 0)
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        yield
    finally:
        for descriptor, saved in enumerate(ours):
            os.dup2(saved, descriptor)
            os.close(saved)
        for number, handler in handlers.items():
            signal.signal(number, handler)
