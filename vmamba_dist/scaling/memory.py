"""What a run holds on each GPU and its host, in closed form: standing state, one micro-batch, an engine's buffers.

Law: a figure follows from the config, the number of GPUs and the model's shapes alone. Weights, gradients, moments and
averages are float32; how they are split is the engine's (vmamba_dist/parallel).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from vmamba_dist.config.schema import Config, ConfigError, ParallelConfig
from vmamba_dist.core.gpus import Gpu
from vmamba_dist.data.order import choose_accumulate
from vmamba_dist.models import flops
from vmamba_dist.models.variants import Variant, configured
from vmamba_dist.scaling.activations import FLOAT32, POLICIES, Part, Peak, Policy, WeightBytes, parts, peak

GIB = 2**30
# On an H200 (benchmarks/results/memory_recompute_*_gpu.md) the context was .75 GiB for Base, .94 for Huge, 1.24 for 2b.
CONTEXT = 0.9 * GIB  # the CUDA context, with the kernels' code
NCCL = 1.0 * GIB  # communicators and their channels, of several GPUs: assumed
ALONE = {"ddp": 0.0, "fsdp": 0.55 * GIB, "deepspeed": 0.95 * GIB}  # of one process: measured there
WORKSPACES = 0.1 * GIB  # of cuBLAS and cuDNN
SLACK = 0.04  # of what is allocated, that the allocator cannot do without: assumed; with room it held .02 to .29 more
# DeepSpeed's buckets in elements, as vmamba_dist/parallel/zero_config.py sets them.
BUCKET = 25_000_000
DEFAULT_STAGE = 2


@dataclass(frozen=True)
class Job:
    """A config on so many GPUs of a kind."""

    cfg: Config
    gpus: int
    gpu: Gpu
    classes: int

    @property
    def variant(self) -> Variant:
        """The architecture. Raises ConfigError for an unknown name."""
        return configured(self.cfg.model)

    @property
    def compute(self) -> int:
        """Bytes an element of matrix products' inputs."""
        return 2 if self.cfg.precision.compute == "bfloat16" else FLOAT32

    @property
    def params(self) -> int:
        return flops.params(self.variant, self.classes)

    @property
    def share(self) -> int:
        """Samples of an update that a rank learns from. Raises ConfigError where the batch does not divide."""
        choose_accumulate(self.cfg.data.global_batch, self.gpus, None)
        return self.cfg.data.global_batch // self.gpus

    @property
    def micro_batch(self) -> int:
        """Samples that a rank holds at once, as configured."""
        accumulate = choose_accumulate(self.cfg.data.global_batch, self.gpus, self.cfg.parallel.micro_batch)
        return self.share // accumulate

    def parts(self, micro_batch: int) -> list[Part]:
        cfg = self.cfg
        found = parts(
            self.variant,
            cfg.data.image_size,
            micro_batch,
            compute=self.compute,
            classes=self.classes,
            generation=self.gpu.generation,
            cascade=cfg.model.scan_pattern == "cascade",
            # ZeRO-3 gathers weights module by module, and a compiled block is composed of them.
            fuse=cfg.parallel.zero_stage != 3 and cfg.parallel.compile == "off",
        )
        try:
            return list(found)
        except ValueError as error:
            raise ConfigError(f"data.image_size={cfg.data.image_size}: {error}") from error


@dataclass(frozen=True)
class Standing:
    """What is there between steps, in bytes by name, and what an element of the weights costs within one."""

    gpu: dict[str, float]
    host: dict[str, float]
    weights: WeightBytes
    update: float = 0.0  # bytes of gradients in an update, activations gone; 0: no more than a backward's end


@dataclass(frozen=True)
class Memory:
    """Bytes by name at the worst moment of a step."""

    policy: Policy
    micro_batch: int
    gpu: dict[str, float] = field(repr=False)
    host: dict[str, float] = field(repr=False)
    allocated: float  # what torch.cuda.max_memory_allocated would say
    total: float  # what the device has to have
    room: float

    @property
    def fits(self) -> bool:
        return self.total <= self.room


def memory(job: Job, policy: Policy, micro_batch: int) -> Memory:
    """Estimate a step with `micro_batch` samples at once on each rank."""
    accumulating = micro_batch < job.share
    held = standing(job, accumulating=accumulating)
    chain = job.parts(micro_batch)
    worst = max(peak(chain, policy, held.weights), Peak(held.update, held.update))
    side = job.cfg.data.image_size
    gpu = held.gpu | {
        "gradients at the peak": worst.gradients,
        "activations, weights in bf16": worst.bytes - worst.gradients,
        "samples": float(FLOAT32 * micro_batch * (3 * side * side + job.classes)),
    }
    allocated = sum(gpu.values()) + WORKSPACES
    beside = CONTEXT + communicators(job)
    total = allocated * (1 + SLACK) + beside
    gpu["CUDA, NCCL, allocator"] = total - sum(gpu.values())
    return Memory(policy, micro_batch, gpu, held.host, allocated, total, job.gpu.memory_gib * GIB)


def communicators(job: Job) -> float:
    """Bytes that NCCL takes of a GPU."""
    return NCCL if job.gpus > 1 else ALONE[job.cfg.parallel.engine]


def standing(job: Job, *, accumulating: bool) -> Standing:
    """What the engine holds between steps, and its buffers."""
    size = float(FLOAT32 * job.params)
    average = size if job.cfg.ema.enabled else 0.0
    engine = {"ddp": _ddp, "fsdp": _fsdp, "deepspeed": _deepspeed}[job.cfg.parallel.engine]
    held = engine(job, size, average, accumulating)
    saved = (3 * size + average) / job.gpus  # each element is staged by one rank
    if job.cfg.parallel.engine == "deepspeed":
        held.host["gathered for a checkpoint"] = saved
    if job.cfg.checkpoint.async_save:
        held.host["checkpoint staging"] = saved
    return held


def micro_batches(job: Job) -> Iterator[int]:
    """Yield the micro-batches that a rank's share can be cut into, the largest first: even ones that divide it."""
    share = job.share
    most = min(share, job.cfg.parallel.micro_batch or share)
    return (n for n in range(most - most % 2, 0, -2) if share % n == 0)


def largest_micro_batch(job: Job, policy: Policy) -> int | None:
    """The largest micro-batch that fits; None where not even two samples do."""
    return next((n for n in micro_batches(job) if memory(job, policy, n).fits), None)


def way_out(job: Job) -> str:
    """Name the first change of the config, from the cheapest in time to the dearest, with which two samples fit."""
    now = job.cfg.parallel
    engines: list[tuple[list[str], ParallelConfig]] = [([], now)]
    if job.gpus > 1:
        whole = replace(
            now, engine="fsdp", zero_stage=None, deepspeed_config="", shard_size=None, replicate_size=None
        )
        keys = [] if now.engine == "fsdp" else ["parallel.engine=fsdp"]
        keys += [
            f"parallel.{key}=null"
            for key in ("zero_stage", "shard_size", "replicate_size")
            if getattr(now, key) is not None
        ]
        keys += ["parallel.deepspeed_config="] if now.deepspeed_config else []
        engines += [(keys, whole)]
        engines += [([*keys, "parallel.cpu_offload=true"], replace(whole, cpu_offload=True))]
    for keys, parallel in engines:
        for policy in POLICIES:
            other = replace(
                job, cfg=replace(job.cfg, parallel=replace(parallel, recompute=policy, micro_batch=None))
            )
            found = largest_micro_batch(other, policy)
            if found is not None:
                how = [f"parallel.recompute={policy}"] if policy != now.recompute else []
                return " ".join([*keys, *how, f"parallel.micro_batch={found}"])
    return "more or larger GPUs, a smaller model or smaller images"


def _ddp(job: Job, size: float, average: float, accumulating: bool) -> Standing:
    gpu = {"weights": size, "optimizer": 2 * size, "average": average}
    if job.gpus > 1:
        gpu["buckets"] = size  # DistributedDataParallel reduces copies of the gradients
    return Standing(gpu, {}, WeightBytes(_cast(job), job.compute, FLOAT32, accumulating))


def _fsdp(job: Job, size: float, average: float, accumulating: bool) -> Standing:
    _, shards = job.cfg.parallel.copies_and_shards(job.gpus)
    state = {"weights": size / shards, "optimizer": 2 * size / shards, "average": average / shards}
    # Of the largest unit: its weights and its neighbour's, its gradients, and in float32 those on their way to owners.
    unit = max(part.params for part in job.parts(2))
    gathered = {"gathered weights": float(unit * (3 * job.compute + FLOAT32))}
    kept, host = FLOAT32 / shards, {}
    if job.cfg.parallel.cpu_offload:
        host = state | {"gradients": size / shards}
        state, kept = {}, 0.0
    if accumulating:  # a rank sums whole gradients until they are reduced
        kept = float(FLOAT32)
    return Standing(state | gathered, host, WeightBytes(0, job.compute, kept, accumulating))


def _deepspeed(job: Job, size: float, average: float, accumulating: bool) -> Standing:
    parallel = job.cfg.parallel
    stage = parallel.zero_stage or DEFAULT_STAGE
    share = size / job.gpus
    bucket = float(FLOAT32 * min(BUCKET, job.params))
    optimizer = {"master weights": share, "optimizer": 2 * share}
    if job.gpus == 1 and stage < 3 and not parallel.cpu_offload:
        # ZeRO-1, as zero_config.py has it. Gradients stay where the backward leaves them; the update copies them flat.
        held = {"weights": size, **optimizer, "average": average}
        return Standing(held, {}, WeightBytes(_cast(job), job.compute, FLOAT32, accumulating), 2 * size)
    optimizer["gradient parts"] = share
    if stage == 3:
        state = {"weights": share, **optimizer, "average": average / job.gpus}
        largest = max(row.weights + row.plain for part in job.parts(2) for row in part.rows)
        buffers = {"buckets": 2 * bucket, "gathered weights": bucket + FLOAT32 * largest}
    else:
        state = {"weights": size, **optimizer, "average": average}
        # One is filled while the other is reduced. A process alone has one, for gradients that go to the host.
        buffers = {"buckets": 2 * bucket if job.gpus > 1 else bucket}
    host: dict[str, float] = {}
    if parallel.cpu_offload:
        host = {name: state.pop(name) for name in (list(state) if stage == 3 else optimizer)}
        host["copies for the device"] = share
    whole = stage == 1 and accumulating  # a rank sums whole gradients until they are reduced
    flat = share if stage < 3 and not parallel.cpu_offload else 0.0  # the update's copy of the parts
    weights = WeightBytes(_cast(job), job.compute, FLOAT32 if whole else 0.0, whole)
    return Standing(state | buffers, host, weights, flat)


def _cast(job: Job) -> int:
    """Bytes of autocast's copy of a weight."""
    return job.compute if job.compute != FLOAT32 else 0
