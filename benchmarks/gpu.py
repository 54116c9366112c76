"""How a GPU is measured here: calls queue up behind a sleeping GPU, so a time is the kernels' and not the launches'.

Law: every figure of one table comes from one process; what is compared is sampled in turn, and medians are told.
`Rehearsal` goes through the same motions on a CPU and its figures mean nothing: it finds the errors that would
otherwise cost time on a GPU.
"""

import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Protocol

import torch

Call = Callable[[], object]
MAX_HOLD_CYCLES = 1 << 25  # about 17 ms


class Device(Protocol):
    """Where a benchmark runs."""

    device: torch.device
    scan_backend: str  # of vmamba_kernels
    rehearsing: bool

    def spans(self, calls: Sequence[Call]) -> list[float]:
        """Run the calls in order; return the ms of each, every one from a cold cache and without launch times."""

    def pace(self, call: Call, count: int) -> float:
        """Return the ms a call takes in a row of so many, launches and all."""

    def peak(self, call: Call) -> tuple[int, int]:
        """Return the bytes held before the call, and at its peak."""

    def copy_bytes_per_s(self) -> float:
        """Return what a copy moves, bytes read and bytes written counted."""

    def clocks_mhz(self, load: Call) -> tuple[float, float]:
        """Return the SM clock's limit, and what it stands at while the load runs."""


class Gpu:
    """The first CUDA device."""

    scan_backend = "triton"
    rehearsing = False

    def __init__(self) -> None:
        self.device = torch.device("cuda", 0)
        self.properties = torch.cuda.get_device_properties(self.device)
        self.launch_bound = 0  # samples whose launches outlasted the longest hold
        self._hold_cycles = 1 << 22  # about 2 ms
        self._evictor: torch.Tensor | None = None

    def spans(self, calls: Sequence[Call]) -> list[float]:
        if self._evictor is None:
            size = 4 * self.properties.L2_cache_size
            self._evictor = torch.empty(size, dtype=torch.uint8, device=self.device)
        while True:
            torch.cuda.synchronize()
            torch.cuda._sleep(self._hold_cycles)
            marks = []
            for call in calls:
                self._evictor.zero_()
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                call()
                end.record()
                marks.append((start, end))
            awake = marks[0][0].query()  # before all was queued: a launch may have been waited for
            torch.cuda.synchronize()
            if awake and self._hold_cycles < MAX_HOLD_CYCLES:
                self._hold_cycles *= 2
                continue
            self.launch_bound += awake
            return [start.elapsed_time(end) for start, end in marks]

    def pace(self, call: Call, count: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(count):
            call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / count

    def peak(self, call: Call) -> tuple[int, int]:
        self._evictor = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return before, torch.cuda.max_memory_allocated()

    def copy_bytes_per_s(self) -> float:
        source = torch.randn(1 << 29, device=self.device)
        target = torch.empty_like(source)
        medians = interleaved({"copy": lambda: self.spans([lambda: target.copy_(source)])}, 10)
        return 2 * source.nbytes / (1e-3 * medians["copy"][0])

    def clocks_mhz(self, load: Call) -> tuple[float, float]:
        limit = self.properties.clock_rate / 1e3
        query = ["nvidia-smi", "--id=0", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
        started = time.monotonic()
        try:
            while time.monotonic() < started + 0.3:
                load()
                torch.cuda.synchronize()
            asked = subprocess.Popen(query, stdout=subprocess.PIPE, text=True)
            while asked.poll() is None:
                load()
                torch.cuda.synchronize()
            assert asked.stdout is not None
            return limit, float(asked.stdout.read())
        except (OSError, ValueError):  # no nvidia-smi, or one that will not tell
            return limit, limit


class Rehearsal:
    """A CPU in a GPU's place, for tiny shapes."""

    scan_backend = "torch"
    rehearsing = True

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def spans(self, calls: Sequence[Call]) -> list[float]:
        return [self.pace(call, 1) for call in calls]

    def pace(self, call: Call, count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            call()
        return 1e3 * (time.perf_counter() - start) / count

    def peak(self, call: Call) -> tuple[int, int]:
        call()
        return 1 << 20, 2 << 20

    def copy_bytes_per_s(self) -> float:
        return 1e10

    def clocks_mhz(self, load: Call) -> tuple[float, float]:
        load()
        return 1000.0, 1000.0


def interleaved(
    samples: Mapping[str, Callable[[], Sequence[float]]], repetitions: int, warm_up: int = 2
) -> dict[str, list[float]]:
    """Take every sample in turn, so often; return the medians of each, figure by figure."""
    for _ in range(warm_up):
        for sample in samples.values():
            sample()
    taken: dict[str, list[Sequence[float]]] = {name: [] for name in samples}
    for _ in range(repetitions):
        for name, sample in samples.items():
            taken[name].append(sample())
    return {
        name: [statistics.median(column) for column in zip(*rows, strict=True)]
        for name, rows in taken.items()
    }


def description() -> list[str]:
    """Return markdown lines that name the GPU and what stands between it and Python."""
    p = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--id=0", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    return [
        f"- GPU: {p.name}, compute capability {p.major}.{p.minor}, {p.multi_processor_count} multiprocessors, "
        f"{p.total_memory / 2**30:.0f} GiB, {p.L2_cache_size / 2**20:.0f} MiB of L2",
        f"- driver {driver}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, "
        + ", ".join(f"{package} {_version(package)}" for package in ("triton", "timm")),
    ]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
