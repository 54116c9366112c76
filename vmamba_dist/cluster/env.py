"""From a launcher's words to ours: a task's place among the others, and what it may use.

Law: this file only writes RANK and WORLD_SIZE, `core.dist` alone reads them; all of it happens before
torch is loaded, because torch reads its environment once. On Slurm everything follows from the job's own
variables, so the same pickle serves every start and every element of an array.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from submitit import JobEnvironment


@dataclass(frozen=True)
class Place:
    """A task of a job: which of how many, and where on its machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def submitit_place() -> Place:
    """This task's place, inside a submitit job."""
    job = JobEnvironment()
    return Place(job.global_rank, job.num_tasks, job.local_rank, job.num_tasks // job.num_nodes)


def submitit_folder() -> Path:
    """The folder of this task's submitit job."""
    return Path(JobEnvironment().paths.folder)


@dataclass(frozen=True)
class SlurmStart:
    """One start of a Slurm job, as its processes and its batch script see it."""

    job: str  # its number, an array element's own; never for scontrol: the last element's is that of the whole array
    key: str  # JOB, or ARRAY_INDEX: what scontrol takes, and submitit's files are named after
    restart: int  # 0 at first, one more with each requeue
    nodes: str  # as Slurm writes them: node[1-4]


def slurm_start(environ: Mapping[str, str] = os.environ) -> SlurmStart | None:
    """The start that this process belongs to; None outside Slurm, and in a local job inside an allocation."""
    if environ.get("SUBMITIT_EXECUTOR", "slurm") != "slurm" or "SLURM_JOB_ID" not in environ:
        return None
    job, array = environ["SLURM_JOB_ID"], environ.get("SLURM_ARRAY_JOB_ID")
    return SlurmStart(
        job,
        f"{array}_{environ['SLURM_ARRAY_TASK_ID']}" if array else job,
        int(environ.get("SLURM_RESTART_COUNT") or 0),
        environ.get("SLURM_JOB_NODELIST", ""),
    )


def slurm_rendezvous(start: SlurmStart, first_host: str) -> str:
    """Name the first node and a port of this start's own as the place where the ranks meet; return torch's word.

    Neither another job nor an earlier start of this one, whose last ranks may still linger, meets at that port. It lies
    below the range from which Linux takes ports by itself.
    """
    os.environ["MASTER_ADDR"] = first_host
    os.environ["MASTER_PORT"] = str(20000 + (int(start.job) + 4001 * start.restart) % 10000)
    return "env://"


def first_host() -> str:
    """The first machine of this task's submitit job."""
    return str(JobEnvironment().hostnames[0])


def cores_of_task() -> int:
    """How many cores Slurm gave this task."""
    cores = len(os.sched_getaffinity(0))
    return int(os.environ.get("SLURM_CPUS_PER_TASK") or cores)


def use_cpus_of_task() -> None:
    """Compute with as many threads as this task has cores, unless OMP_NUM_THREADS says otherwise."""
    os.environ.setdefault("OMP_NUM_THREADS", str(cores_of_task()))


def launcher_lives() -> bool:
    """True while the controller of this task's local job is still this process's parent."""
    return str(os.getppid()) == JobEnvironment().job_id


def enter(place: Place, rendezvous: str) -> None:
    """Say where this process stands and where the ranks meet."""
    os.environ["RANK"] = str(place.rank)
    os.environ["WORLD_SIZE"] = str(place.size)
    os.environ["LOCAL_RANK"] = str(place.local_rank)
    os.environ["LOCAL_WORLD_SIZE"] = str(place.local_size)
    os.environ["VMAMBA_RENDEZVOUS"] = rendezvous


def share_threads(tasks: int) -> None:
    """Divide this machine's cores among `tasks` processes, unless OMP_NUM_THREADS says otherwise.

    Ranks that spin on each other's cores made a forward pass five times slower.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // tasks)))


def visible_devices() -> str | None:
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def show_devices(value: str | None) -> None:
    """Let this process see the GPUs that the submitter saw; submitit's local executor hides them all."""
    if value is None:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = value


def under_launcher() -> bool:
    """True in a process that torchrun or a submitit job has started."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "VMAMBA_RENDEZVOUS" in os.environ
