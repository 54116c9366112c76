"""`vmamba submit`, whose plan also says what a GPU would hold and how many steps there are.

Law: a job is started by the cluster's room alone; what this one adds is told in a dry run, and decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from vmamba_dist.cluster import submit
from vmamba_dist.config import Config
from vmamba_dist.core.gpus import GPUS
from vmamba_dist.optim.schedule import total_samples
from vmamba_dist.scaling.command import samples_and_classes
from vmamba_dist.scaling.memory import GIB, Job, memory


def main(words: Sequence[str]) -> int:
    """Run `submit` with the words of its command line; return its exit code."""
    return submit.main(words, estimate=estimate)


def estimate(cfg: Config) -> dict[str, str]:
    """The plan's lines that take an estimate, by name. Raises ConfigError where batch and ranks do not go together."""
    return {"memory": _memory(cfg), "steps": _steps(cfg)}


def _memory(cfg: Config) -> str:
    gpus = cfg.launch.nodes * cfg.launch.gpus_per_node
    if not gpus:
        return "not planned without GPUs (launch.gpus_per_node)"
    if cfg.model.scan_backend == "torch":
        return "not planned for model.scan_backend=torch"
    classes = cfg.model.num_classes or samples_and_classes(cfg)[1]
    policy = cfg.parallel.recompute
    jobs = [Job(cfg, gpus, gpu, classes) for gpu in GPUS]
    held = [memory(job, policy, job.micro_batch) for job in jobs]
    fits = [job.gpu.name for job, each in zip(jobs, held, strict=True) if each.fits]
    most = max(each.total for each in held) / GIB
    return (
        f"{most:.1f} GiB a GPU in micro-batches of {held[0].micro_batch} with parallel.recompute={policy}; "
        f"fits {', '.join(fits) or 'no GPU of the table'}; more: vmamba plan"
    )


def _steps(cfg: Config) -> str:
    batch, schedule = cfg.data.global_batch, cfg.schedule
    samples, _, told = samples_and_classes(cfg)
    total = total_samples(schedule, global_batch=batch, steps_per_epoch=samples // batch)
    budget = f"{total} samples" if schedule.samples else f"{schedule.epochs} epochs of {samples} ({told})"
    return f"{-(-total // batch)} of {batch} samples: {budget}"
