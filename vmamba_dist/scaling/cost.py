"""What a step takes, from a stated model whose efficiencies were measured once.

Law: a step is arithmetic, traffic and scans at measured rates, what communication they cannot hide, and the update. The
rates are those of VMamba-T's eager training step on an H100 at batch 128, bfloat16 (benchmarks/results/
profile_eager_gpu.md for the split, models_replayed_gpu.md, "Before", for the whole); elsewhere they scale with a GPU's
peak (the scans, which instructions bound, too) and its memory's bandwidth. Reading samples, evaluating and saving are
left out. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vmamba_dist.core.gpus import Gpu, gpu_named
from vmamba_dist.models import flops
from vmamba_dist.scaling.activations import FLOAT32, Part, Policy, Row
from vmamba_dist.scaling.memory import DEFAULT_STAGE, Job

MEASURED_ON = gpu_named("h100-80")
MATRIX = 0.28  # of the bf16 peak: 3.63 TFLOP of matrix products and convolutions in 13.3 ms
TRAFFIC = 0.64  # of the memory's bandwidth: 38.7 GB of norms, casts, activations and sums in 18.0 ms
SCAN_S = 64e-12  # seconds an element and state, forward and backward: .202e9 in 12.9 ms
SCAN_FORWARD = 0.30  # of that: 4.3 of 14.3 ms
UPDATE = 0.60  # of the memory's bandwidth: 0.85 GB of AdamW in 0.42 ms (the profile's group holds casts too)
BETWEEN = 1.02  # a step, 45.6 ms where no launch is waited for, over the sum of its kernels
# Seconds that the host takes to launch one block's forward and backward in eager mode: assumed (a hundred kernels at
# 12 µs; for recomputing, in the proportions that were seen on a CPU). A micro-batch takes no less.
LAUNCH_S: dict[Policy, float] = {"off": 1.2e-3, "selective": 2.6e-3, "block": 2.0e-3}
# What a virtual machine's host took with an H200, the least of Base to Huge at 32 samples
# (benchmarks/results/memory_recompute_ddp_gpu.md); another's, with an H100, 4.9 ms for the first.
SLOW_LAUNCH_S: dict[Policy, float] = {"off": 4.6e-3, "selective": 11.7e-3, "block": 7.2e-3}
HOST_GBS = 25.0  # GB/s between a GPU and its host, for what is offloaded


@dataclass(frozen=True)
class Place:
    """How GPUs are joined."""

    per_node: int
    network_gbs: float  # GB/s of each GPU to other machines

    def rate(self, gpu: Gpu, ranks: int) -> float:
        """Bytes a second of each rank in a collective of so many neighbours."""
        return 1e9 * (gpu.link_gbs if ranks <= self.per_node else self.network_gbs)


@dataclass(frozen=True)
class Cost:
    """Seconds of one update, and what follows."""

    compute: float
    communication: float  # all of it
    exposed: float  # of that, what computation cannot hide
    update: float
    images: int  # an update
    mfu: float

    @property
    def step(self) -> float:
        return self.compute + self.exposed + self.update

    @property
    def images_per_s(self) -> float:
        return self.images / self.step


def cost(job: Job, policy: Policy, micro_batch: int, place: Place) -> Cost:
    """Estimate an update of the configured global batch in micro-batches of `micro_batch` samples."""
    count = job.share // micro_batch
    chain = job.parts(micro_batch)
    forward, backward = (BETWEEN * seconds for seconds in _passes(chain, policy, job.gpu))
    launched = 0.0 if job.cfg.parallel.compile != "off" else LAUNCH_S[policy] * job.variant.num_blocks
    compute = count * max(forward + backward, launched)
    communication, hides = _communication(job, count, place)
    exposed = max(0.0, communication - (compute if hides else backward))
    update = _update(job)
    image = flops.train_flops_per_image(
        job.variant, job.cfg.data.image_size, job.cfg.data.image_size, job.classes
    )
    step = compute + exposed + update
    mfu = image * job.share / (step * 1e12 * job.gpu.bf16_tflops)
    return Cost(compute, communication, exposed, update, job.cfg.data.global_batch, mfu)


def _passes(chain: Iterable[Part], policy: Policy, gpu: Gpu) -> tuple[float, float]:
    """Seconds of one forward, and of one backward with what it recomputes."""
    forward = backward = 0.0
    for part in chain:
        rows = list(zip(part.rows, part.inputs(), strict=True))
        forward += sum(_seconds(row, 1, into + row.out, SCAN_FORWARD, gpu) for row, into in rows)
        backward += sum(
            _seconds(row, 2, into + row.out + row.keeps, 1 - SCAN_FORWARD, gpu) for row, into in rows
        )
        if part.is_recomputed(policy):
            # A recomputation stops where the last thing that the backward needs is at hand.
            last = max(i for i, (row, _) in enumerate(rows) if row.keeps)
            backward += sum(
                _seconds(row, 1, into + row.out, SCAN_FORWARD, gpu)
                for row, into in rows[:last]
                if not (policy == "selective" and row.scanned)
            )
    return forward, backward


def _seconds(row: Row, products: int, moved: int, scan: float, gpu: Gpu) -> float:
    if row.scanned:
        return row.scanned * SCAN_S * scan * MEASURED_ON.bf16_tflops / gpu.bf16_tflops
    if row.flops:
        return products * row.flops / (MATRIX * 1e12 * gpu.bf16_tflops)
    return moved / (TRAFFIC * 1e12 * gpu.memory_tbs)


def _communication(job: Job, count: int, place: Place) -> tuple[float, bool]:
    """Seconds of an update's collectives, and whether the whole computation can hide them, or a backward alone."""
    parallel, ranks = job.cfg.parallel, job.gpus
    size = float(FLOAT32 * job.params)
    rate = place.rate(job.gpu, ranks)
    if parallel.engine == "fsdp":
        copies, shards = parallel.copies_and_shards(ranks)
        gathered = 2 * count * size * job.compute / FLOAT32
        within = (gathered + size) * _others(shards) / place.rate(job.gpu, shards)
        return within + 2 * size / shards * _others(copies) / rate, True
    if parallel.engine == "deepspeed":
        stage = parallel.zero_stage or DEFAULT_STAGE
        reductions = 1 if stage == 1 else count
        gathers = 2 * count if stage == 3 else 1
        return (reductions + gathers) * size * _others(ranks) / rate, stage == 3
    return 2 * size * _others(ranks) / rate, False


def _others(ranks: int) -> float:
    """The share of a tensor that is with the other ranks."""
    return (ranks - 1) / ranks


def _update(job: Job) -> float:
    """Norm, AdamW (weights, moments and gradients in, weights and moments out) and average, each on its own share."""
    parallel, ranks = job.cfg.parallel, job.gpus
    size = float(FLOAT32 * job.params)
    split = {"ddp": 1, "deepspeed": ranks, "fsdp": 1}[parallel.engine]
    if parallel.engine == "fsdp":
        split = parallel.copies_and_shards(ranks)[1]
    average = 3 * size if job.cfg.ema.enabled else 0.0
    averaged_by = (
        1 if parallel.engine == "deepspeed" and (parallel.zero_stage or DEFAULT_STAGE) < 3 else split
    )
    moved = (7 + 2) * size / split + average / averaged_by
    if parallel.cpu_offload:
        return 2 * size / split / (1e9 * HOST_GBS) + moved / (1e9 * HOST_GBS)
    return moved / (UPDATE * 1e12 * job.gpu.memory_tbs)
