"""What can be configured: frozen dataclasses, one a component, every default with its reason.

Law: a value is checked here or in the component that owns it, never in the loop. Fields marked `replace`
do not change what training computes, so a resume may change them; every other field is part of the
trajectory and of the config digest. No torch in this package: `vmamba --help` must stay light.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from vmamba_dist.config.addresses import fault_of, redact


class UserError(Exception):
    """What its user can mend: told in one line, without a traceback."""


class ConfigError(UserError, ValueError):
    """A user's mistake in a config: the message names the key, the value and the fix."""


def replaceable(default: Any) -> Any:
    """Mark a field that does not change the trajectory: a resume may give it another value."""
    return field(default=default, metadata={"trajectory": False})


def added(default: Any) -> Any:
    """Mark a field that came later: its default is what earlier versions did, and stays out of the digest."""
    return field(default=default, metadata={"added": True})


def _require(ok: bool, key: str, value: object, fix: str) -> None:
    if not ok:
        raise ConfigError(f"{key}={value!r}: {fix}")


def _check_address(key: str, address: str) -> None:
    fault = fault_of(address)
    if fault:
        raise ConfigError(f"{key}={redact(address)!r}: {fault}")


def _listed(values: Sequence[int]) -> str:
    return " or ".join(filter(None, (", ".join(map(str, values[:-1])), str(values[-1]))))


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and how it starts."""

    dir: str = replaceable("runs/default")  # everything a run writes is below it
    seed: int = 0  # all randomness derives from it
    resume: str = replaceable(
        "auto"
    )  # auto: newest whole checkpoint here | never: refuse if one is here | PATH
    allow_changes: bool = replaceable(False)  # go on although the trajectory's config differs
    max_steps: int | None = replaceable(None)  # stop after this step, with an evaluation and a checkpoint
    loss_spike: float = replaceable(
        0.0
    )  # a loss above this times the median of the last 64 is a spike; 0: off
    max_rollbacks: int = replaceable(
        0
    )  # how often a run may go back to its last checkpoint, past the bad data

    def __post_init__(self) -> None:
        _require(self.dir != "", "run.dir", self.dir, "give a folder")
        _require(0 <= self.seed < 2**31, "run.seed", self.seed, "use 0 … 2147483647")
        _require(self.resume != "", "run.resume", self.resume, "use auto, never, or a checkpoint's path")
        _require(
            self.max_steps is None or self.max_steps >= 1,
            "run.max_steps",
            self.max_steps,
            "use 1 or more, or null",
        )
        _require(
            self.loss_spike == 0 or self.loss_spike > 1,
            "run.loss_spike",
            self.loss_spike,
            "a factor over the usual loss: use more than 1, or 0 for off",
        )
        _require(self.max_rollbacks >= 0, "run.max_rollbacks", self.max_rollbacks, "use 0 or more")


@dataclass(frozen=True)
class ModelConfig:
    """Which backbone. Names are those of `vmamba_dist.models.list_models()`."""

    name: str = "vmamba_tiny_s1l8"
    num_classes: int | None = None  # null: what the shards' index says
    drop_path: float | None = None  # rate of the last block; null: the variant's own
    # What differs from the named model's row, for ladders of sizes between the names; null: as named.
    width: int | None = added(None)  # of the first stage; it doubles from stage to stage
    depths: tuple[int, int, int, int] | None = added(None)  # blocks of each stage
    ssm_ratio: float | None = added(None)  # inner width of a block's scan over the block's
    scan_pattern: Literal["cross2d", "unidi", "bidi", "cascade"] = "cross2d"
    scan_backend: Literal["auto", "triton", "torch"] = replaceable(
        "auto"
    )  # auto: the fastest one for the device

    def __post_init__(self) -> None:
        _require(
            self.num_classes is None or self.num_classes >= 2,
            "model.num_classes",
            self.num_classes,
            "use 2 or more",
        )
        _require(
            self.drop_path is None or 0 <= self.drop_path < 1,
            "model.drop_path",
            self.drop_path,
            "use 0 … below 1",
        )
        _require(
            self.width is None or (self.width >= 2 and self.width % 2 == 0),
            "model.width",
            self.width,
            "use an even number, or null",
        )
        _require(
            self.depths is None or all(d >= 1 for d in self.depths),
            "model.depths",
            self.depths,
            "use 1 or more blocks a stage, or null",
        )
        _require(
            self.ssm_ratio is None or self.ssm_ratio > 0,
            "model.ssm_ratio",
            self.ssm_ratio,
            "use more than 0, or null",
        )


@dataclass(frozen=True)
class S3Config:
    """Where s3:// addresses lead. Region, profile and credentials are the environment's."""

    endpoint_url: str = replaceable("")  # of another service than Amazon's; "": as the environment says

    def __post_init__(self) -> None:
        _require(
            self.endpoint_url == "" or self.endpoint_url.startswith(("http://", "https://")),
            "data.s3.endpoint_url",
            redact(self.endpoint_url),
            "give an address like https://storage.example.org",
        )
        _check_address("data.s3.endpoint_url", self.endpoint_url)


@dataclass(frozen=True)
class SourceConfig:
    """One source of a mixture: an item of data.train where that is a list."""

    path: str  # a folder, address or pattern, as data.train alone
    weight: float = 1.0  # its share of the samples is weight / sum of all weights

    def __post_init__(self) -> None:
        _require(self.path != "", "data.train[].path", self.path, "give a folder, an address or a pattern")
        _check_address("data.train[].path", self.path)
        _require(
            self.weight > 0, "data.train[].weight", self.weight, "use more than 0, or leave the source out"
        )


@dataclass(frozen=True)
class DataConfig:
    """Which samples, in what order, read by whom."""

    # A folder, https://…, s3://bucket/prefix, a pattern like …/name-{000000..000099}.tar, or a mixture:
    # [{path: …, weight: …}, …]. The content and the weights, not the addresses, are in the digest.
    train: str | tuple[SourceConfig, ...] = replaceable("")
    keep_index: Literal["run", "beside"] = replaceable(
        "run"
    )  # where an index that had to be made is kept: in the run directory, or beside the shards for all runs
    cache_dir: str = replaceable("")  # folder on the machine's own disk, shared by its ranks; "": no cache
    cache_gib: float = replaceable(64.0)  # GiB that the cache may take; the least recently used shard goes
    read_timeout_s: float = replaceable(30.0)  # seconds that one request of an object store may take
    read_attempts: int = replaceable(8)  # requests for one range that may fail; waits between grow to 16 s
    max_failures: int = replaceable(
        64
    )  # a source's failed requests in a reader; ten that work make up for one
    s3: S3Config = field(default_factory=S3Config, metadata={"trajectory": False})
    split: str = "train"  # which split of that index
    image_size: int = 224  # px, square, a multiple of 4
    global_batch: int = 1024  # samples an update, over all ranks (the paper's)
    workers: int = replaceable(4)  # reader processes a rank; 0 reads in the training process
    decoder: Literal["pil", "torchvision", "gpu"] = "pil"  # who decodes JPEGs for training (docs/decoding.md)
    prefetch: int = replaceable(2)  # micro-batches a worker reads ahead
    block: int = 16  # samples shuffled together within a lane
    lanes: int | None = None  # null: chosen once a run by the rule of order.choose_lanes, then fixed
    shuffle_gib: float = 4.0  # GiB over the whole job that open shuffle blocks may take; bounds lanes
    max_bad_fraction: float = replaceable(0.001)  # of an epoch's samples; beyond it the run stops

    def __post_init__(self) -> None:
        _require(
            self.image_size >= 4 and self.image_size % 4 == 0,
            "data.image_size",
            self.image_size,
            "use a multiple of 4 px (the patch)",
        )
        _require(
            self.global_batch >= 2 and self.global_batch % 2 == 0,
            "data.global_batch",
            self.global_batch,
            "use an even number: samples are mixed in pairs",
        )
        _require(0 <= self.workers <= 256, "data.workers", self.workers, "use 0 … 256")
        _require(self.prefetch >= 1, "data.prefetch", self.prefetch, "use 1 or more")
        _require(self.block >= 1, "data.block", self.block, "use 1 or more")
        _require(
            self.lanes is None or (self.lanes >= 2 and self.lanes % 2 == 0),
            "data.lanes",
            self.lanes,
            "use an even number, or null",
        )
        _require(self.shuffle_gib > 0, "data.shuffle_gib", self.shuffle_gib, "use more than 0 GiB")
        if isinstance(self.train, str):
            _check_address("data.train", self.train)
        else:
            _require(
                len(self.train) > 0, "data.train", [], "a mixture needs a source: [{path: …, weight: …}]"
            )
        _require("://" not in self.cache_dir, "data.cache_dir", redact(self.cache_dir), "use a local folder")
        _require(self.cache_gib > 0, "data.cache_gib", self.cache_gib, "use more than 0 GiB")
        _require(self.read_timeout_s > 0, "data.read_timeout_s", self.read_timeout_s, "use more than 0 s")
        _require(self.read_attempts >= 1, "data.read_attempts", self.read_attempts, "use 1 or more")
        _require(self.max_failures >= 1, "data.max_failures", self.max_failures, "use 1 or more")
        _require(
            0 <= self.max_bad_fraction < 1, "data.max_bad_fraction", self.max_bad_fraction, "use 0 … below 1"
        )


@dataclass(frozen=True)
class AugmentConfig:
    """What happens to a training image. Defaults are VMamba's ImageNet recipe."""

    crop: bool = True  # random resized crop; false resizes the whole image
    crop_scale: tuple[float, float] = (0.08, 1.0)  # share of the image's area
    crop_ratio: tuple[float, float] = (0.75, 1.3333333333333333)  # width over height
    hflip: float = 0.5  # probability
    rotate_deg: float = 0.0  # ± degrees
    shift: float = 0.0  # ± share of the image's side
    zoom: float = 0.0  # scale in 1 ± zoom
    randaugment_ops: int = 2  # operations an image; 0 is off
    randaugment_magnitude: float = 9.0  # 0 … 10, timm's scale
    randaugment_std: float = 0.5  # of the magnitude, normal, drawn per image
    color_jitter: float = (
        0.0  # brightness, contrast, saturation; the recipe's .4 is inactive under RandAugment
    )
    erasing: float = 0.25  # probability of one random box of normal noise
    mixup: float = 0.8  # Beta's alpha; 0 is off
    cutmix: float = 1.0  # Beta's alpha; 0 is off
    switch: float = 0.5  # probability of cutmix where both are on
    mix_prob: float = 1.0  # probability that a step is mixed
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of pixels in 0 … 1, ImageNet
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: Literal["bicubic", "bilinear", "nearest"] = "bicubic"

    def __post_init__(self) -> None:
        for name in ("hflip", "erasing", "switch", "mix_prob"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"augment.{name}", value, "a probability: use 0 … 1")
        for name in ("rotate_deg", "shift", "zoom", "color_jitter", "mixup", "cutmix", "randaugment_std"):
            value = getattr(self, name)
            _require(value >= 0, f"augment.{name}", value, "use 0 or more")
        _require(self.zoom < 1, "augment.zoom", self.zoom, "use less than 1")
        _require(self.shift <= 1, "augment.shift", self.shift, "use 0 … 1")
        low, high = self.crop_scale
        _require(0 < low <= high <= 1, "augment.crop_scale", self.crop_scale, "use 0 < low ≤ high ≤ 1")
        low, high = self.crop_ratio
        _require(0 < low <= high, "augment.crop_ratio", self.crop_ratio, "use 0 < low ≤ high")
        _require(0 <= self.randaugment_ops <= 8, "augment.randaugment_ops", self.randaugment_ops, "use 0 … 8")
        _require(
            0 <= self.randaugment_magnitude <= 10,
            "augment.randaugment_magnitude",
            self.randaugment_magnitude,
            "use 0 … 10",
        )
        _require(all(s > 0 for s in self.std), "augment.std", self.std, "use numbers above 0")


@dataclass(frozen=True)
class ObjectiveConfig:
    """A way of learning."""

    name: Literal["classify"] = "classify"
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        _require(
            0 <= self.label_smoothing < 1,
            "objective.label_smoothing",
            self.label_smoothing,
            "use 0 … below 1",
        )


@dataclass(frozen=True)
class OptimConfig:
    """AdamW. lr and its floor scale linearly with the global batch over `lr_batch`."""

    lr: float = 5e-4  # peak, at lr_batch samples an update
    lr_batch: int = 512  # the lr above belongs to this batch; 0: lr is taken as it is
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.05
    decay: Literal["ssm_exempt", "official"] = "ssm_exempt"  # official also decays A_logs and dt_projs_bias
    clip: float = 5.0  # global gradient norm; 0 measures and does not clip

    def __post_init__(self) -> None:
        _require(self.lr > 0, "optim.lr", self.lr, "use more than 0")
        _require(self.lr_batch >= 0, "optim.lr_batch", self.lr_batch, "use 0 or more")
        _require(all(0 <= b < 1 for b in self.betas), "optim.betas", self.betas, "use 0 … below 1")
        _require(self.eps > 0, "optim.eps", self.eps, "use more than 0")
        _require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "use 0 or more")
        _require(self.clip >= 0, "optim.clip", self.clip, "use 0 or more")


@dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up, then cosine or wsd; the clock is samples seen, so it holds for every batch and world size."""

    kind: Literal["cosine", "wsd"] = added("cosine")  # wsd: warm-up, stable, decay
    epochs: int = 300
    samples: int | None = added(None)  # budget in samples seen, cut to whole steps; null: epochs
    warmup: float = 20 / 300  # share of all samples
    warmup_samples: int | None = added(None)  # the same in samples; null: the share
    decay: float = added(0.2)  # wsd: share of all samples, at the end
    warmup_lr_ratio: float = 1e-3  # first lr over peak
    min_lr_ratio: float = 1e-2  # last lr over peak

    def __post_init__(self) -> None:
        _require(self.epochs >= 1, "schedule.epochs", self.epochs, "use 1 or more")
        _require(
            self.samples is None or self.samples >= 1,
            "schedule.samples",
            self.samples,
            "use 1 or more, or null for schedule.epochs",
        )
        _require(0 <= self.warmup < 1, "schedule.warmup", self.warmup, "a share: use 0 … below 1")
        _require(
            self.warmup_samples is None or self.warmup_samples >= 0,
            "schedule.warmup_samples",
            self.warmup_samples,
            "use 0 or more, or null for schedule.warmup",
        )
        _require(0 < self.decay <= 1, "schedule.decay", self.decay, "a share: use above 0 … 1")
        for name in ("warmup_lr_ratio", "min_lr_ratio"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"schedule.{name}", value, "use 0 … 1")


@dataclass(frozen=True)
class EmaConfig:
    """Exponential moving average of the weights. With warm-up it is useful from the first epoch."""

    enabled: bool = True
    decay: float = 0.9999
    warmup: bool = True  # decay_t = min(decay, (1 + t) / (10 + t))

    def __post_init__(self) -> None:
        _require(0 <= self.decay < 1, "ema.decay", self.decay, "use 0 … below 1")


@dataclass(frozen=True)
class ParallelConfig:
    """How the work is spread. Nothing here changes what is computed, beyond rounding."""

    engine: Literal["ddp", "fsdp", "deepspeed"] = replaceable("ddp")  # one process runs without any wrapper
    zero_stage: Literal[1, 2, 3] | None = replaceable(None)  # deepspeed's; null: 2
    deepspeed_config: str = replaceable("")  # a JSON file of the user's own, merged; conflicts are errors
    shard_size: int | None = replaceable(None)  # fsdp: ranks that share one copy; null: all
    replicate_size: int | None = replaceable(None)  # fsdp: copies; null: what shard_size leaves
    cpu_offload: bool = replaceable(False)  # fsdp, deepspeed: weights and optimizer in the host's memory
    micro_batch: int | None = replaceable(None)  # most samples a rank holds at once; null: all of its share
    recompute: Literal["off", "block", "selective"] = replaceable(
        "off"
    )  # block: activations are recomputed, the stem's and block by block; selective: blocks', but the scan's outputs
    compile: Literal["off", "block"] = replaceable("off")  # torch.compile a block; slow to start on a CPU
    timeout_s: float = replaceable(600.0)  # a collective that takes longer is a failure

    def __post_init__(self) -> None:
        _require(
            self.micro_batch is None or (self.micro_batch >= 2 and self.micro_batch % 2 == 0),
            "parallel.micro_batch",
            self.micro_batch,
            "use an even number (pairs stay together), or null",
        )
        _require(self.timeout_s > 0, "parallel.timeout_s", self.timeout_s, "use more than 0 s")
        for key in ("shard_size", "replicate_size"):
            value = getattr(self, key)
            _require(value is None or value >= 1, f"parallel.{key}", value, "use 1 or more ranks, or null")
        for keys, engines in (
            (("zero_stage", "deepspeed_config"), ("deepspeed",)),
            (("shard_size", "replicate_size"), ("fsdp",)),
            (("cpu_offload",), ("fsdp", "deepspeed")),
        ):
            for key in keys:
                value = getattr(self, key)
                _require(
                    not value or self.engine in engines,
                    f"parallel.{key}",
                    value,
                    f"parallel.engine={self.engine} has no such option; leave it out, or use parallel.engine="
                    + " or ".join(engines),
                )

    def copies_and_shards(self, world_size: int) -> tuple[int, int]:
        """How many copies of the weights fsdp's ranks hold, and over how many ranks each is sharded.

        Raises ConfigError where the two do not make up the world.
        """
        copies, shards = self.replicate_size, self.shard_size
        copies = copies or (world_size // shards if shards else 1)
        shards = shards or world_size // copies
        if copies * shards != world_size:
            given = [
                f"parallel.{key}={value}"
                for key in ("shard_size", "replicate_size")
                if (value := getattr(self, key)) is not None
            ]
            fits = [n for n in range(1, world_size + 1) if world_size % n == 0]
            raise ConfigError(
                f"{' and '.join(given)} do not make up the {world_size} ranks of this run: "
                f"use parallel.shard_size={_listed(fits)}, and leave parallel.replicate_size null"
            )
        return copies, shards


@dataclass(frozen=True)
class PrecisionConfig:
    """Masters are always float32; the recurrence always computes in float32."""

    compute: Literal["float32", "bfloat16"] = "bfloat16"  # autocast's dtype
    device: Literal["auto", "cpu", "cuda"] = replaceable("auto")  # auto: cuda where there is one
    threads: int = replaceable(0)  # of torch on a CPU, a process; 0: torch's own choice

    def __post_init__(self) -> None:
        _require(self.threads >= 0, "precision.threads", self.threads, "use 0 or more")


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep."""

    every_steps: int = replaceable(1000)
    keep: int = replaceable(3)  # the newest ones
    keep_every: int = replaceable(0)  # also each whose step is a multiple of this; 0: none
    keep_best: bool = replaceable(True)  # also the best by eval.metric; a new best is saved at once
    async_save: bool = replaceable(True)  # write while training goes on; costs a copy in the host's memory
    max_failures: int = replaceable(3)  # saves that may fail in a row; then the run stops

    def __post_init__(self) -> None:
        _require(self.every_steps >= 1, "checkpoint.every_steps", self.every_steps, "use 1 or more")
        _require(
            self.keep >= 2,
            "checkpoint.keep",
            self.keep,
            "use 2 or more: a damaged newest one needs a predecessor",
        )
        _require(self.keep_every >= 0, "checkpoint.keep_every", self.keep_every, "use 0 or more")
        _require(
            self.max_failures >= 1,
            "checkpoint.max_failures",
            self.max_failures,
            "use 1 or more: 1 stops at the first save that fails",
        )


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation during training, and `vmamba eval`."""

    data: str = replaceable("")  # folder, address or pattern; "": data.train's, of a mixture the first one's
    split: str = replaceable("auto")  # auto: the first of val, validation, test that the index has
    every_epochs: float = replaceable(1.0)  # 0: only at the end
    batch: int = replaceable(128)  # samples a rank
    crop: float = replaceable(
        0.875
    )  # share of the resized side that the centre crop keeps; 1 is the whole image
    metric: Literal["top1", "top5", "loss"] = replaceable(
        "top1"
    )  # what "best" means, on the weights named by `weights`
    weights: Literal["ema", "raw"] = replaceable("ema")  # for "best" and `vmamba eval`; raw where EMA is off
    patience: int = 0  # stop when `metric` has not improved for this many evaluations; 0: never
    checkpoint: str = replaceable("")  # `vmamba eval`: a checkpoint or a run directory (its newest whole one)

    def __post_init__(self) -> None:
        _check_address("eval.data", self.data)
        _require(self.every_epochs >= 0, "eval.every_epochs", self.every_epochs, "use 0 or more")
        _require(self.batch >= 1, "eval.batch", self.batch, "use 1 or more")
        _require(0 < self.crop <= 1, "eval.crop", self.crop, "use above 0 … 1")
        _require(self.patience >= 0, "eval.patience", self.patience, "use 0 or more")


@dataclass(frozen=True)
class TelemetryConfig:
    """What a run says about itself."""

    log_every_steps: int = replaceable(10)  # lines in train.log; metrics.jsonl has every step
    tensorboard: bool = replaceable(True)
    images: int = replaceable(8)  # augmented images shown in TensorBoard, once an attempt
    peak_tflops: float = replaceable(0.0)  # of one device, for MFU; 0: from the table of known devices

    def __post_init__(self) -> None:
        _require(
            self.log_every_steps >= 1, "telemetry.log_every_steps", self.log_every_steps, "use 1 or more"
        )
        _require(self.images >= 0, "telemetry.images", self.images, "use 0 or more")
        _require(self.peak_tflops >= 0, "telemetry.peak_tflops", self.peak_tflops, "use 0 or more")


# Keys of launch that nothing but a Slurm job reads, beside those that name a part of the cluster.
_SLURM_READS = ("mem_gb", "cpus_per_task", "max_requeues", "setup")


@dataclass(frozen=True)
class LaunchConfig:
    """Where `launch/submit.py` runs the job, and with what."""

    cluster: Literal["auto", "local", "slurm", "debug"] = replaceable(
        "auto"
    )  # auto: slurm where nodes > 1 or a key of Slurm's is set, else local | debug: in this process
    preset: str = replaceable("")  # a file of configs/cluster/ (its name or path) with launch.* of a cluster
    nodes: int = replaceable(1)  # machines; more than one needs Slurm
    gpus_per_node: int = replaceable(0)  # one process each, on CUDA; 0: as precision.device finds it
    tasks_per_node: int | None = replaceable(None)  # processes a machine; null: gpus_per_node, or one
    name: str = replaceable("vmamba")
    follow: bool | None = replaceable(None)  # stay and show progress; null: here yes, on Slurm no
    time_limit_min: int | None = replaceable(
        None
    )  # then the run saves and ends; null: none, or the partition's
    signal_delay_s: int = replaceable(120)  # so long before the limit it is told to: two steps and a save
    # Slurm's own; empty or null: what the cluster takes by itself.
    partition: str = replaceable("")
    account: str = replaceable("")
    qos: str = replaceable("")
    constraint: str = replaceable("")
    exclude: str = replaceable("")  # nodes, as Slurm writes them: node[3-5,9]
    mem_gb: float | None = replaceable(None)  # GiB a machine
    cpus_per_task: int | None = replaceable(None)  # null: one, and one for each of data.workers
    setup: str = replaceable("")  # shell lines before training: module load …
    max_requeues: int | None = replaceable(None)  # starts after the first; null: as many as it takes

    def __post_init__(self) -> None:
        _require(1 <= self.nodes <= 65536, "launch.nodes", self.nodes, "use 1 or more")
        _require(
            self.nodes == 1 or self.cluster in ("auto", "slurm"),
            "launch.nodes",
            self.nodes,
            f"launch.cluster={self.cluster} is one machine: use launch.cluster=slurm, or torchrun on each machine",
        )
        _require(0 <= self.gpus_per_node <= 64, "launch.gpus_per_node", self.gpus_per_node, "use 0 … 64")
        _require(
            self.tasks_per_node is None or 1 <= self.tasks_per_node <= 1024,
            "launch.tasks_per_node",
            self.tasks_per_node,
            "use 1 … 1024, or null",
        )
        _require(
            not self.gpus_per_node or self.tasks_per_node in (None, self.gpus_per_node),
            "launch.tasks_per_node",
            self.tasks_per_node,
            f"a GPU has one process: leave it null beside launch.gpus_per_node={self.gpus_per_node}",
        )
        _require(
            self.time_limit_min is None or self.time_limit_min >= 1,
            "launch.time_limit_min",
            self.time_limit_min,
            "use 1 or more minutes, or null",
        )
        _require(
            1 <= self.signal_delay_s <= 65535, "launch.signal_delay_s", self.signal_delay_s, "use 1 … 65535 s"
        )
        _require(self.name != "" and "/" not in self.name, "launch.name", self.name, "use a plain name")
        for key in ("name", "partition", "account", "qos", "constraint", "exclude"):
            value = getattr(self, key)  # written on a line of the batch script
            _require(
                value.isprintable() and "\\" not in value,
                f"launch.{key}",
                value,
                "leave out line breaks, control characters and backslashes",
            )
        _require("\0" not in self.setup, "launch.setup", self.setup, "leave out the zero byte")
        _require(
            self.mem_gb is None or self.mem_gb > 0,
            "launch.mem_gb",
            self.mem_gb,
            "use more than 0 GiB, or null",
        )
        for key, least in (("cpus_per_task", 1), ("max_requeues", 0)):
            number = getattr(self, key)
            _require(
                number is None or number >= least, f"launch.{key}", number, f"use {least} or more, or null"
            )

        # A preset is written for Slurm, and may be tried here; what somebody asks for by name is not let fall.
        unread = [key for key in _SLURM_READS if getattr(self, key) not in (None, "")]
        if self.cluster == "debug" and self.time_limit_min is not None:
            unread.append("time_limit_min")
        if self.cluster in ("local", "debug") and not self.preset and unread:
            _require(
                False,
                f"launch.{unread[0]}",
                getattr(self, unread[0]),
                f"launch.cluster={self.cluster} does not read it: leave it out, or use launch.cluster=slurm",
            )

    @property
    def on_slurm(self) -> bool:
        """True where the job goes to Slurm: named, or implied by what only Slurm knows."""
        keys = ("preset", "partition", "account", "qos", "constraint", "exclude", *_SLURM_READS)
        asked = self.nodes > 1 or any(getattr(self, key) not in (None, "") for key in keys)
        return self.cluster == "slurm" or (self.cluster == "auto" and asked)

    @property
    def tasks(self) -> int:
        """Processes a machine."""
        return self.tasks_per_node or self.gpus_per_node or 1


@dataclass(frozen=True)
class StudyConfig:
    """A scaling study (`vmamba study`): a ladder of models, how much each learns from, and what it may cost.

    A study's config is that of its runs, and this group beside it; run.dir holds a run directory a point.
    """

    models: tuple[str, ...] = replaceable(())  # rungs of the ladder by name
    widths: tuple[int, ...] = replaceable(())  # more rungs: model.name at these first widths, as written
    sizes: int = replaceable(0)  # more rungs: so many widths between the two below, in equal ratios,
    width_from: int = replaceable(16)  # each stage divisible by 16 below Base's width of 128
    width_to: int = replaceable(128)  # and by 64 from there up
    depth_power: float = replaceable(0.0)  # third stage's blocks ∝ (width / the rule's first) ** this
    samples: tuple[int, ...] = replaceable(())  # a grid: every model learns from each of these counts
    flops: tuple[float, ...] = replaceable(())  # or IsoFLOP levels: training FLOPs of one run
    levels: int = replaceable(0)  # or so many levels, as high as the total allows,
    level_ratio: float = replaceable(2.0)  # each this times the one before
    min_samples: int = replaceable(1)  # an IsoFLOP point outside of these two is left out
    max_samples: int = replaceable(2**62)
    total_flops: float = replaceable(0.0)  # what the study may cost; 0: no limit
    total_gpu_hours: float = replaceable(0.0)  # the same in GPU-hours of `gpu`; 0: no limit
    seeds: int = replaceable(1)  # runs a point: run.seed, run.seed + 1, …
    held_out: int = replaceable(0)  # so many of the largest models are predicted, not fitted
    lrs: tuple[float, ...] = replaceable(())  # values of optim.lr that the search tries; none: no search
    search_samples: int = replaceable(0)  # budget of a run of the search; 0: the smallest of the grid
    search_sizes: int = replaceable(0)  # the search is at so many of the smallest models; 0: all fitted ones
    search_held_out: bool = replaceable(False)  # and at the held-out ones, whose losses stay out of the fit
    lr_power: float = replaceable(0.0)  # without a search: optim.lr × (params / the smallest's) ** this
    batch_power: float = replaceable(0.0)  # data.global_batch × (params / the smallest's) ** this
    branch: bool = replaceable(True)  # wsd: shorter budgets start from a checkpoint of the longest
    gpu: str = replaceable("")  # kind, as `vmamba plan` names it: costs in GPU-hours too
    gpus: int = replaceable(1)  # of one run
    device_gflops: float = replaceable(0.0)  # without a gpu: what one process sustains, for hours

    def __post_init__(self) -> None:
        for name in ("widths", "samples", "flops", "lrs"):
            values = getattr(self, name)
            _require(all(v > 0 for v in values), f"study.{name}", values, "use numbers above 0")
        for name in ("models", "widths", "samples", "flops", "lrs"):
            values = getattr(self, name)
            _require(len(set(values)) == len(values), f"study.{name}", values, "name each once")
        ways = [name for name in ("samples", "flops", "levels") if getattr(self, name)]
        _require(
            len(ways) <= 1,
            "study." + " and study.".join(ways),
            "…",
            "take one: a grid of samples, levels of FLOPs, or a number of levels",
        )
        _require(self.level_ratio > 1, "study.level_ratio", self.level_ratio, "use more than 1")
        _require(
            self.width_from <= self.width_to,
            "study.width_from",
            self.width_from,
            "use study.width_to or less",
        )
        _require(
            1 <= self.min_samples <= self.max_samples,
            "study.min_samples",
            self.min_samples,
            "use 1 … study.max_samples",
        )
        for name in ("seeds", "gpus", "width_from"):
            _require(getattr(self, name) >= 1, f"study.{name}", getattr(self, name), "use 1 or more")
        for name in (
            "sizes",
            "levels",
            "held_out",
            "search_samples",
            "search_sizes",
            "total_flops",
            "total_gpu_hours",
            "device_gflops",
        ):
            _require(getattr(self, name) >= 0, f"study.{name}", getattr(self, name), "use 0 or more")
        _require(
            self.sizes == 0 or self.sizes >= 2, "study.sizes", self.sizes, "use 2 or more, or 0 for no rule"
        )


@dataclass(frozen=True)
class Config:
    """A whole run. A group's name is never also a value."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    study: StudyConfig = field(default_factory=StudyConfig)
