"""Whole models on a GPU: throughput against timm's peers, peak memory, large images, and where a step's time goes.

Law: every model sees the same images, precision, loss and optimizer, draws no drop path, and has the memory layout that
serves it best. Throughput is that of steps in a row, launches and all. `ss2d_gpu.py` runs these parts after its gate.
"""

import gc
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import timm
import torch
import torch.nn.functional as F
from gpu import Device, interleaved
from report import table
from rivals import Official, materialising_model
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from vmamba_dist.models import create_model
from vmamba_dist.models.ss2d import LayerNorm
from vmamba_dist.models.vmamba import Block, VMamba

Report = tuple[str, str, list[str]]  # name, title, lines

VMAMBA, SWIN, CONVNEXT, OFFICIAL = "vmamba", "swin", "convnext", "official"
COMPOSED = "composed"
ENGINES = ("eager", "replayed", "compiled", "graphed")
CONTENDERS = (VMAMBA, COMPOSED, SWIN, CONVNEXT)
TIMM = {SWIN: "swin_tiny_patch4_window7_224", CONVNEXT: "convnext_tiny"}
TITLES = {
    VMAMBA: "VMamba-T (vmamba_tiny_s1l8)",
    COMPOSED: "VMamba-T, blocks composed, torch's norms",
    SWIN: "Swin-T (timm)",
    CONVNEXT: "ConvNeXt-T (timm)",
    OFFICIAL: "official VMamba-T",
}
STEPS = 2  # in a row, of each sample
BATCH = 128
PIXELS = ((224, 125), (1024, 6))  # side and batch: 6.27 and 6.29 million pixels

# A kernel belongs to the first group whose pattern its name contains.
GROUPS = (
    ("scan", r"ss2d|scan"),
    ("convolutions", r"conv|dgrad|wgrad|implicit|cudnn"),
    ("matrix products", r"gemm|nvjet|cutlass|cublas|splitk|wgmma|xmma|linear_gelu"),
    ("LayerNorm", r"layer_?norm|gammabeta|rows_norm"),
    ("GELU and SiLU", r"gelu|silu|sigmoid|_erf"),
    ("optimizer", r"adam"),
    ("copies and casts", r"copy|memcpy|memset|fill|transpose|catarray"),
    ("sums", r"reduce|sum"),
    ("other", r""),
)


@dataclass(frozen=True)
class Setting:
    """What every part needs to know."""

    device: Device
    engine: (
        str  # eager, compiled, and either as CUDA graphs, so that no launch is waited for: replayed, graphed
    )
    contenders: Sequence[str]
    official: Official | None
    repetitions: int
    say: Callable[[str], None]

    @property
    def batch(self) -> int:
        return 2 if self.device.rehearsing else BATCH

    @property
    def side(self) -> int:
        return 32 if self.device.rehearsing else 224


def build(name: str, setting: Setting) -> nn.Module:
    """Build a contender without drop path, on the device."""
    rehearsing = setting.device.rehearsing
    if name == OFFICIAL:
        assert setting.official is not None
        model = setting.official.model()
    elif name in (VMAMBA, COMPOSED):
        model = create_model(
            "vmamba_atto" if rehearsing else "vmamba_tiny_s1l8",
            drop_path_rate=0.0,
            scan_backend=setting.device.scan_backend,
        )
        if name == COMPOSED:
            compose(model)
    else:
        small = {"img_size": setting.side, "window_size": 1} if rehearsing and name == SWIN else {}
        model = timm.create_model(TIMM[name], drop_path_rate=0.0, **small)
    return model.to(setting.device.device)


def compose(model: VMamba) -> None:
    """Leave the scan alone of what is ours: the rest is torch's modules, one by one."""
    for part in model.modules():
        if isinstance(part, Block):
            part.fuse = "never"
        elif isinstance(part, LayerNorm):
            part.backend = "torch"


class Workload:
    """A model with images and labels: a training step, or an inference."""

    def __init__(self, model: nn.Module, setting: Setting, side: int, batch: int, *, training: bool) -> None:
        device = setting.device.device
        draw = torch.Generator(device).manual_seed(0)
        self.images = torch.randn((batch, 3, side, side), device=device, generator=draw)
        self.labels = torch.randint(1000, (batch,), device=device, generator=draw)
        self.model = model.train(training)
        self.call: Callable[[Tensor], Tensor] = self.model
        self.graphed = setting.engine == "graphed"
        if setting.engine in ("compiled", "graphed"):
            if setting.device.rehearsing:
                self.call = torch.compile(self.model, dynamic=False, backend="aot_eager")
            else:
                mode = "reduce-overhead" if self.graphed else None
                self.call = torch.compile(self.model, dynamic=False, mode=mode)
        self.replayed = setting.engine == "replayed" and not setting.device.rehearsing
        self.optimizer = (
            torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
            if training
            else None
        )

    def channels_last(self) -> "Workload":
        self.model.to(memory_format=torch.channels_last)
        self.images = self.images.contiguous(memory_format=torch.channels_last)
        return self

    def capture(self) -> None:
        """Record the model's forward and backward, or its inference, once; `call` replays them from then on."""
        if self.optimizer is not None:
            with self.precision():
                self.call = torch.cuda.make_graphed_callables(self.model, (self.images,))
            return
        graph, eager = torch.cuda.CUDAGraph(), self.call
        with torch.no_grad(), self.precision(), torch.cuda.graph(graph):
            eager(self.images)
        self.call = lambda images: graph.replay()

    def precision(self) -> torch.autocast:
        # A cast that autocast caches in one graph would not be made in the next.
        return torch.autocast(self.images.device.type, torch.bfloat16, cache_enabled=not self.replayed)

    def run(self) -> None:
        if self.graphed:
            torch.compiler.cudagraph_mark_step_begin()
        if self.optimizer is None:
            with torch.no_grad(), self.precision():
                self.call(self.images)
            return
        self.optimizer.zero_grad(set_to_none=True)
        with self.precision():
            loss = F.cross_entropy(self.call(self.images), self.labels)
        loss.backward()
        self.optimizer.step()

    def warm_up(self) -> None:
        for _ in range(3):
            self.run()
        if self.replayed:
            self.capture()
            self.run()


def release() -> None:
    """Give back what finished workloads held: graphs, then memory."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def throughputs(workloads: dict[str, Workload], setting: Setting) -> dict[str, float]:
    """Return the images a second of each, sampled in turn; a workload that fails is left out and told of."""
    ready = {}
    for name, workload in workloads.items():
        try:
            workload.warm_up()
        except Exception as error:  # noqa: BLE001 the others are worth their time all the same
            setting.say(f"{name} failed: {type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        setting.say(f"{name} is warm")
        ready[name] = workload
    samples = {
        name: (lambda w=workload: [setting.device.pace(w.run, STEPS)]) for name, workload in ready.items()
    }
    count = max(3, setting.repetitions // STEPS)
    medians = interleaved(samples, count, warm_up=1) if samples else {}
    return {name: 1e3 * len(ready[name].labels) / ms for name, (ms,) in medians.items()}


def model(setting: Setting) -> Report:
    """Compare the throughput of a training step and of inference with the peers'."""
    names = list(setting.contenders)
    if setting.official is not None and setting.engine == "eager":
        names.append(OFFICIAL)
    columns: dict[str, dict[str, float]] = {}
    for way in ("training", "inference"):
        workloads = {}
        for name in names:
            make = partial(
                Workload, setting=setting, side=setting.side, batch=setting.batch, training=way == "training"
            )
            if name != CONVNEXT:
                workloads[name] = make(build(name, setting))
                continue
            # Compiled code picks its own layout inside; both are tried where that costs no second compilation.
            workloads[f"{name}, channels last"] = make(build(name, setting)).channels_last()
            if setting.engine == "eager":
                workloads[name] = make(build(name, setting))
        columns[way] = throughputs(workloads, setting)
        workloads.clear()
        release()
    rows = []
    for name in dict.fromkeys(key for column in columns.values() for key in column):
        base, _, layout = name.partition(", ")
        cells = [f"{TITLES[base]}{', ' + layout if layout else ''}"]
        for way, column in columns.items():
            own, rate = column.get(name), _best(columns[way], VMAMBA)
            cells += [f"{own:.0f}" if own else "failed", f"{rate / own:.2f}×" if own and rate else ""]
        rows.append(cells)
    lines = [
        f"One training step (forward, cross-entropy, backward, fused AdamW) and one inference, batch {setting.batch}, "
        f"{setting.side} px, bfloat16 autocast, {setting.engine}; medians of {max(3, setting.repetitions // STEPS)} "
        f"samples in turn of {STEPS} steps in a row. The ratio is VMamba-T's throughput over the row's.",
        "",
        *table(("model", "training, img/s", "VMamba-T / row", "inference, img/s", "VMamba-T / row"), rows),
    ]
    return f"models_{setting.engine}_gpu", f"Models on a GPU, {setting.engine}", lines


def _best(column: dict[str, float], name: str) -> float | None:
    return max((rate for key, rate in column.items() if key.partition(", ")[0] == name), default=None)


def memory(setting: Setting) -> Report:
    """Compare the peak memory of a training step: fused, materialising, and with block checkpointing."""
    cases = [
        ("materialising", VMAMBA, True, False),
        ("fused", VMAMBA, False, False),
        ("fused, block checkpointing", VMAMBA, False, True),
        ("materialising, block checkpointing", VMAMBA, True, True),
    ]
    if setting.official is not None and setting.engine == "eager":
        cases.append(("official model", OFFICIAL, False, False))
    found: dict[str, tuple[int, int]] = {}
    for title, name, swapped, checkpointing in cases:
        with materialising_model() if swapped else nullcontext():
            network = build(name, setting)
            if checkpointing:
                network.set_grad_checkpointing()
            workload = Workload(network, setting, setting.side, setting.batch, training=True)
            workload.warm_up()
            found[title] = setting.device.peak(workload.run)
        del network, workload
        release()
        setting.say(f"{title}: peak {found[title][1] / 2**20:.0f} MiB")
    reference = found["materialising"]
    rows = [
        (
            title,
            f"{peak / 2**20:.0f}",
            f"**{peak / reference[1]:.2f}**",
            f"{(peak - before) / 2**20:.0f}",
            f"{(peak - before) / (reference[1] - reference[0]):.2f}",
        )
        for title, (before, peak) in found.items()
    ]
    lines = [
        f"Peak of what is allocated in one training step of VMamba-T, batch {setting.batch}, {setting.side} px, "
        f"bfloat16 autocast, {setting.engine}, AdamW. The second pair leaves out what is held between steps (weights, "
        "gradients, optimizer state, images). Materialising: the same model, its scan over four permuted copies "
        "(rivals.materialised_scan).",
        "",
        *table(
            ("model", "peak, MiB", "of materialising", "above rest, MiB", "of materialising"),
            rows,
        ),
    ]
    return f"memory_{setting.engine}_gpu", f"Peak memory of a training step on a GPU, {setting.engine}", lines


def resolution(setting: Setting) -> Report:
    """Compare the throughput a pixel at 1024 px with that at 224 px, the pixels a batch alike."""
    sizes = ((32, 4), (64, 1)) if setting.device.rehearsing else PIXELS
    rows = []
    for way in ("training", "inference"):
        workloads = {
            f"{side} px, batch {batch}": Workload(
                build(VMAMBA, setting), setting, side, batch, training=way == "training"
            )
            for side, batch in sizes
        }
        rates = throughputs(workloads, setting)
        pixels = {
            title: rates[title] * side * side
            for (side, _), title in zip(sizes, workloads, strict=True)
            if title in rates
        }
        first = next(iter(workloads))
        rows += [
            (
                way,
                title,
                f"{rates[title]:.1f}",
                f"{rate / 1e6:.1f}",
                f"**{rate / pixels[first]:.3f}**" if first in pixels else "",
            )
            for title, rate in pixels.items()
        ]
        workloads.clear()
        release()
    columns = ("VMamba-T", "images", "img/s", "million pixels a second", "of 224 px")
    lines = [f"bfloat16 autocast, {setting.engine}, AdamW.", "", *table(columns, rows)]
    return f"resolution_{setting.engine}_gpu", f"Large images on a GPU, {setting.engine}", lines


def profiled(setting: Setting) -> Report:
    """List the kernels of one training step of VMamba-T by their share of its time."""
    workload = Workload(build(VMAMBA, setting), setting, setting.side, setting.batch, training=True)
    workload.warm_up()
    step_ms = setting.device.pace(workload.run, STEPS)
    on_gpu = not setting.device.rehearsing
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as seen:
        setting.device.pace(workload.run, STEPS)
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    kernels: dict[str, tuple[float, int]] = {}
    for event in seen.key_averages():
        if (
            event.device_type != kind
            or event.is_user_annotation
            or event.key.startswith(("##", "Optimizer."))
        ):
            continue
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        name = short(event.key)
        ms, calls = kernels.get(name, (0.0, 0))
        kernels[name] = (ms + spent / 1e3 / STEPS, calls + event.count)
    del workload
    release()
    busy = sum(ms for ms, _ in kernels.values())
    groups = {group: 0.0 for group, _ in GROUPS}
    for name, (ms, _) in kernels.items():
        groups[group_of(name)] += ms
    ranked = sorted(kernels.items(), key=lambda item: -item[1][0])
    lines = [
        f"One training step of VMamba-T, batch {setting.batch}, {setting.side} px, bfloat16 autocast, "
        f"{setting.engine}: {step_ms:.2f} ms without the profiler, kernels {busy:.2f} ms with it "
        f"(mean of {STEPS} steps).",
        "",
        *table(
            ("group, by kernel name", "ms", "of the kernels"),
            [
                (group, f"{ms:.3f}", f"{ms / busy:.1%}")
                for group, ms in sorted(groups.items(), key=lambda g: -g[1])
            ],
        ),
        "",
        *table(
            ("kernel", "group", "calls a step", "ms", "of the kernels"),
            [
                (f"`{name}`", group_of(name), f"{calls / STEPS:g}", f"{ms:.3f}", f"{ms / busy:.1%}")
                for name, (ms, calls) in ranked[:40]
            ],
        ),
    ]
    return f"profile_{setting.engine}_gpu", f"Where a training step's time goes, {setting.engine}", lines


def short(kernel: str) -> str:
    """Shorten a kernel's name to what tells it apart, fit for a table."""
    for noise in ("void ", "at::native::", "(anonymous namespace)::", "<unnamed>::"):
        kernel = kernel.replace(noise, "")
    return kernel.replace("|", "/").replace("`", "'")[:110]


def group_of(kernel: str) -> str:
    """Name the group a kernel belongs to."""
    return next(group for group, pattern in GROUPS if re.search(pattern, kernel.lower()))


PARTS: dict[str, Callable[[Setting], Report]] = {
    "model": model,
    "memory": memory,
    "resolution": resolution,
    "profile": profiled,
}
