"""From a launcher's words to ours: a task's place among the others, and what it may use.

Law: this file only writes RANK and WORLD_SIZE, `core.dist` alone reads them; all of it happens before
torch is loaded, because torch reads its environment once.
"""

from __future__ import annotations

import os
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
