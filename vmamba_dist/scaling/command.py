"""`vmamba plan`: what a run would hold, cost and take on GPUs that nobody has paid for yet.

Law: nothing is imported that needs a GPU or torch, and every assumption that a figure rests on is printed with it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmamba_dist.config import Config, ConfigError, load
from vmamba_dist.core.gpus import GPUS, gpu_named
from vmamba_dist.models import flops
from vmamba_dist.models.variants import describe
from vmamba_dist.optim.schedule import total_samples
from vmamba_dist.scaling.activations import POLICIES, Policy
from vmamba_dist.scaling.cost import (
    BETWEEN,
    LAUNCH_S,
    MATRIX,
    MEASURED_ON,
    SCAN_S,
    SLOW_LAUNCH_S,
    TRAFFIC,
    Cost,
    Place,
    cost,
)
from vmamba_dist.scaling.memory import (
    CONTEXT,
    DEFAULT_STAGE,
    GIB,
    SLACK,
    WORKSPACES,
    Job,
    Memory,
    communicators,
    largest_micro_batch,
    memory,
    way_out,
)

IMAGENET = 1_281_167  # training images of ImageNet-1k
CLASSES = 1000
DOES_NOT_FIT = 1  # exit code

# Words of the verb, what each stands for, and what it is where it is left out.
WORDS = {
    "gpus": "GPUs in all",
    "gpu": f"their kind: {', '.join(gpu.name for gpu in GPUS)}",
    "node": "GPUs a machine (launch.gpus_per_node, else 8)",
    "network": "GB/s of each GPU to other machines (50: one 400 Gb/s port)",
    "samples": f"training images (the shards' index, else ImageNet-1k's {IMAGENET})",
    "price": "of a GPU-hour, in any currency",
}
_NUMBER = len("selective") + 3


@dataclass(frozen=True)
class Question:
    """What was asked: a job, where it would run, and what an epoch is."""

    job: Job
    place: Place
    samples: int
    told: str  # where the number of samples comes from
    price: float | None


@dataclass(frozen=True)
class Answer:
    """One recompute policy: its memory as configured, and the step with the micro-batch that it would run with."""

    policy: Policy
    memory: Memory
    largest: int | None  # micro-batch that fits
    cost: Cost | None


def main(words: Sequence[str]) -> int:
    """Print the plan of a config; 1 where it does not fit as configured."""
    question = ask(words)
    answers = plan(question)
    print("\n".join(text(question, answers)))
    mine = _configured(question, answers)
    return 0 if mine.memory.fits else DOES_NOT_FIT


def ask(words: Sequence[str]) -> Question:
    """Read the words of a command line. Raises ConfigError naming the word, its value and the fix."""
    own = {key: value for key, _, value in (word.partition("=") for word in words) if key in WORDS}
    cfg = load([word for word in words if word.partition("=")[0] not in WORDS])
    if cfg.model.scan_backend == "torch":
        raise ConfigError("model.scan_backend=torch: a plan counts the kernels that a GPU runs; use auto")
    launched = cfg.launch.nodes * cfg.launch.gpus_per_node
    if "gpu" not in own:
        raise ConfigError(f"gpu is not set: name {WORDS['gpu']}")
    gpus = _whole("gpus", own.get("gpus", str(launched or 1)))
    node = _whole("node", own.get("node", str(cfg.launch.gpus_per_node or 8)))
    network = _positive("network", own.get("network", "50"))
    price = _positive("price", own["price"]) if "price" in own else None
    samples, classes, told = samples_and_classes(cfg)
    if "samples" in own:
        samples, told = _whole("samples", own["samples"]), "as told"
    job = Job(cfg, gpus, gpu_named(own["gpu"]), cfg.model.num_classes or classes)
    return Question(job, Place(node, network), samples, told, price)


def plan(question: Question) -> list[Answer]:
    """Estimate every recompute policy. Raises ConfigError where batch, ranks and model do not go together."""
    job = question.job
    answers = []
    for policy in POLICIES:
        held = memory(job, policy, job.micro_batch)
        largest = largest_micro_batch(job, policy)
        runs = job.micro_batch if held.fits else largest
        spent = None
        if runs is not None and job.cfg.precision.compute == "bfloat16":
            spent = cost(job, policy, runs, question.place)
        answers.append(Answer(policy, held, largest, spent))
    return answers


def text(question: Question, answers: Sequence[Answer]) -> list[str]:
    """Return the plan for people, as lines."""
    job, cfg = question.job, question.job.cfg
    side = cfg.data.image_size
    giga = flops.macs(job.variant, side, side, job.classes) / 1e9
    count = job.share // job.micro_batch
    mine = _configured(question, answers)
    head = {
        "model": f"{describe(cfg.model)}, {job.params / 1e6:.2f} M parameters, {giga:.2f} GMACs an image of {side} px "
        f"with {job.classes} classes",
        "GPUs": f"{job.gpus} × {job.gpu.name}, {question.place.per_node} a machine; {_engine(job)}",
        "batch": f"{cfg.data.global_batch} an update, {job.share} a GPU in {count} micro-batch{'es' * (count > 1)} of "
        f"{job.micro_batch}; {cfg.precision.compute}",
        "fits": _verdict(job, mine),
    }
    return [
        *(f"{key:<8} {value}" for key, value in head.items()),
        "",
        *_memory_table(question, answers),
        "",
        *_host(question, mine),
        "",
        *_time_table(question, answers),
        "",
        "assumed",
        *(f"  {line}" for line in _assumptions(question)),
    ]


def _verdict(job: Job, mine: Answer) -> str:
    held = (
        f"{mine.memory.total / GIB:.1f} of {job.gpu.memory_gib:.1f} GiB with parallel.recompute={mine.policy}"
    )
    if mine.memory.fits:
        return f"yes: {held}"
    if mine.largest is not None:
        return f"no: {held}; use parallel.micro_batch={mine.largest}"
    return f"no: {held}, nor does any micro-batch; use {way_out(job)}"


def _configured(question: Question, answers: Sequence[Answer]) -> Answer:
    return next(a for a in answers if a.policy == question.job.cfg.parallel.recompute)


def _engine(job: Job) -> str:
    parallel = job.cfg.parallel
    words = [f"parallel.engine={parallel.engine}"]
    if parallel.engine == "fsdp":
        copies, shards = parallel.copies_and_shards(job.gpus)
        words.append(f"{copies} cop{'ies' if copies > 1 else 'y'} in {shards} shards")
    if parallel.engine == "deepspeed":
        words.append(f"ZeRO-{parallel.zero_stage or DEFAULT_STAGE}")
    if parallel.cpu_offload:
        words.append("offloaded to the host")
    return ", ".join(words)


def _row(name: str, cells: Sequence[str]) -> str:
    return f"  {name:<30}" + "".join(f"{cell:>{_NUMBER}}" for cell in cells)


def _titles(name: str, question: Question, answers: Sequence[Answer]) -> str:
    mine = question.job.cfg.parallel.recompute
    return f"{name:<32}" + "".join(f"{'*' * (a.policy == mine) + a.policy:>{_NUMBER}}" for a in answers)


def _memory_table(question: Question, answers: Sequence[Answer]) -> list[str]:
    rows = [_titles("memory a GPU, GiB, by recompute", question, answers)]
    for name in answers[0].memory.gpu:
        rows.append(_row(name, [f"{a.memory.gpu[name] / GIB:.2f}" for a in answers]))
    rows.append(_row("total", [f"{a.memory.total / GIB:.2f}" for a in answers]))
    rows.append(
        _row(f"of {question.job.gpu.memory_gib:.1f}", ["fits" if a.memory.fits else "no" for a in answers])
    )
    rows.append(_row("largest micro-batch that fits", [str(a.largest or "none") for a in answers]))
    return rows


def _host(question: Question, mine: Answer) -> list[str]:
    ranks = min(question.job.gpus, question.place.per_node)
    named = ", ".join(f"{name} {ranks * size / GIB:.2f}" for name, size in mine.memory.host.items())
    return [f"memory a machine's host, GiB, of {ranks} processes, readers aside: {named or 'nothing'}"]


def _time_table(question: Question, answers: Sequence[Answer]) -> list[str]:
    job = question.job
    if job.cfg.precision.compute != "bfloat16":
        return ["time: the model's rates were measured in bfloat16; none for float32"]
    batch, schedule = job.cfg.data.global_batch, job.cfg.schedule
    steps = question.samples // batch
    total = total_samples(schedule, global_batch=batch, steps_per_epoch=steps) // batch
    all_of_it = f"{schedule.samples} samples" if schedule.samples else f"{schedule.epochs} epochs"

    def row(name: str, show: str, of: Callable[[Cost], float]) -> str:
        return _row(name, ["" if a.cost is None else format(of(a.cost), show) for a in answers])

    def hours(spent: Cost, of: int = steps) -> float:
        return of * spent.step / 3600

    runs = [a.memory.micro_batch if a.memory.fits else a.largest for a in answers]
    rows = [
        _titles("time", question, answers),
        _row("micro-batch", [str(n or "none fits") for n in runs]),
        row("computation, ms a step", ".1f", lambda c: 1e3 * c.compute),
        row("communication, ms", ".1f", lambda c: 1e3 * c.communication),
        row("… not hidden, ms", ".1f", lambda c: 1e3 * c.exposed),
        row("update, ms", ".1f", lambda c: 1e3 * c.update),
        row("step, ms", ".1f", lambda c: 1e3 * c.step),
        row("images/s", ",.0f", lambda c: c.images_per_s),
        row("TFLOP a step and GPU", ".2f", lambda c: _step_flops(job) / 1e12),
        row("MFU, %", ".1f", lambda c: 100 * c.mfu),
        row(f"epoch of {steps} steps, h", ".3f", hours),
        row("epoch, GPU-hours", ",.1f", lambda c: job.gpus * hours(c)),
        row(f"{all_of_it}, days", ",.2f", lambda c: hours(c, total) / 24),
        row(f"{all_of_it}, GPU-hours", ",.0f", lambda c: job.gpus * hours(c, total)),
    ]
    if question.price is not None:
        price = question.price * job.gpus
        rows.append(row(f"{all_of_it}, price", ",.0f", lambda c: price * hours(c, total)))
    return rows


def _step_flops(job: Job) -> float:
    side = job.cfg.data.image_size
    return float(flops.train_flops_per_image(job.variant, side, side, job.classes) * job.share)


def _assumptions(question: Question) -> list[str]:
    job, place = question.job, question.place
    gpu = job.gpu
    lines = [
        f"{gpu.name}: {gpu.bf16_tflops:.0f} TFLOP/s bf16 dense, {gpu.memory_tbs} TB/s, {gpu.link_gbs:.0f} GB/s to its "
        f"machine's GPUs; {place.network_gbs:g} GB/s to other machines",
        f"rates of VMamba-T's eager step on an {MEASURED_ON.name}, batch 128 (benchmarks/results/): matrix products at "
        f"{MATRIX:.0%} of peak,",
        f"  elementwise at {TRAFFIC:.0%} of the memory's bandwidth, scans {1e12 * SCAN_S:.0f} ps an element and state, "
        f"a step {BETWEEN - 1:.1%} longer than its kernels",
        *_launches(job),
        "communication is hidden by the backward (ddp, ZeRO-1, 2) or the whole computation (fsdp, ZeRO-3), as far as "
        "that lasts",
        "MFU does not count what is recomputed",
        f"beside what is allocated: CUDA context {CONTEXT / GIB:.1f} GiB, NCCL {communicators(job) / GIB:.2g}, "
        f"cuBLAS and cuDNN {WORKSPACES / GIB:.1f}, {SLACK:.0%} held by the allocator",
        f"{question.samples} samples an epoch ({question.told}); reading, evaluation and saving cost nothing",
    ]
    if job.cfg.parallel.deepspeed_config:
        lines.append(
            "parallel.deepspeed_config is not read: buckets are those that DeepSpeed is given without it"
        )
    return lines


def _launches(job: Job) -> list[str]:
    if job.cfg.parallel.compile != "off":
        return [
            "parallel.compile: memory and kernels are those of the eager step, without what launching them takes"
        ]
    assumed, slow = (
        ", ".join(f"{policy} {1e3 * seconds:.1f}" for policy, seconds in hosts.items())
        for hosts in (LAUNCH_S, SLOW_LAUNCH_S)
    )
    return [
        f"the host launches a block's forward and backward in these ms, assumed: {assumed}",
        f"  a virtual machine's took {slow}: there a micro-batch takes no less than that for each block",
    ]


def samples_and_classes(cfg: Config) -> tuple[int, int, str]:
    """Samples and classes of the training split, from its index where that is on this machine, and which it was."""
    train = cfg.data.train if isinstance(cfg.data.train, str) else ""  # a mixture has no one index
    info = Path(train) / "_info.json"
    if not train or not info.is_file():
        return IMAGENET, CLASSES, "ImageNet-1k's, as the shards are not here"
    try:
        read = json.loads(info.read_text(encoding="utf-8"))
        samples = int(read["splits"][cfg.data.split]["num_samples"])
        classes = int(read.get("num_classes", len(read.get("classes", ()))))  # timm's say neither
        return samples, classes or CLASSES, "the shards' index"
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"data.train={cfg.data.train!r}: {info} has no usable split {cfg.data.split!r} ({error!r}); "
            "see `vmamba shards verify`"
        ) from error


def _whole(word: str, value: str) -> int:
    if not value.isdigit() or int(value) < 1:
        raise ConfigError(f"{word}={value}: use a whole number of 1 or more ({WORDS[word]})")
    return int(value)


def _positive(word: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not (number > 0 and math.isfinite(number)):
        raise ConfigError(f"{word}={value}: use a number above 0 ({WORDS[word]})")
    return number
