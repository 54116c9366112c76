"""Peak memory of a training step on one GPU, by model and recompute policy, against what `vmamba plan` says.

Law: an engine is built as a run builds it, average of the weights included, once a model; the policies are measured on
it in turn. A case that runs out of memory, or fails, costs its own row. Allocated is what torch's allocator gave out at
the worst moment of a step after two others, of which the second must be finite and applied; outside is what the
device lacks beside what the allocator holds.
"""

import argparse
import gc
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from gpu import Device, Gpu, Rehearsal
from report import RESULTS, publish, table

from vmamba_dist.config import load
from vmamba_dist.core.dist import World, world
from vmamba_dist.core.gpus import GPUS
from vmamba_dist.core.gpus import Gpu as Kind
from vmamba_dist.models.vmamba import create_model
from vmamba_dist.objectives.base import Inputs
from vmamba_dist.objectives.classify import Classify
from vmamba_dist.parallel.engine import Engine, Update
from vmamba_dist.parallel.plan import parallelize
from vmamba_dist.parallel.recompute import apply_recompute
from vmamba_dist.scaling.activations import POLICIES, Policy
from vmamba_dist.scaling.cost import Place, cost
from vmamba_dist.scaling.memory import Job, Memory, memory
from vmamba_dist.train.ema import Ema

CLASSES = 1000
MODELS = ("vmamba_base_s1l20", "vmamba_large", "vmamba_xlarge", "vmamba_huge")
BY_SIZE = ("vmamba_2b", "vmamba_giant", *reversed(MODELS))
COLUMNS = (
    "model",
    "recompute",
    "allocated, GiB",
    "planned",
    "planned / allocated",
    "held by the allocator",
    "outside",
    "step, ms",
    "planned",
    "loss",
)
STEPS = 3  # timed


@dataclass(frozen=True)
class Measured:
    """One case, in bytes and ms."""

    allocated: int
    reserved: int
    outside: int
    step: float
    loss: float


class Training:
    """One model in one engine, fed with the same micro-batch again and again."""

    def __init__(self, name: str, batch: int, side: int, words: Sequence[str], place: World) -> None:
        self.cfg = load(
            [f"model.name={name}", f"data.global_batch={batch}", f"data.image_size={side}", *words]
        )
        backend = "torch" if place.device.type == "cpu" else "auto"
        with torch.device("meta"):
            objective = Classify(create_model(name, num_classes=CLASSES, scan_backend=backend), seed=0)
        self.backbone = objective.backbone
        cfg = self.cfg
        self.engine: Engine = parallelize(
            objective, parallel=cfg.parallel, precision=cfg.precision, optim=cfg.optim, world=place, seed=0
        )
        self.average = Ema(self.engine, cfg.ema)
        draw = torch.Generator(place.device).manual_seed(0)
        images = torch.randn((batch, 3, side, side), device=place.device, generator=draw)
        targets = torch.full((batch, CLASSES), 1 / CLASSES, device=place.device)
        positions = torch.arange(batch, device=place.device)
        self.inputs = Inputs(images, targets, positions, 0, [])
        self.steps = 0
        self.loss: torch.Tensor
        self.done: Update

    def step(self) -> None:
        with self.engine.microbatch(sync=True):
            loss = self.engine(self.inputs).total
            self.engine.backward(loss)
        self.loss = loss.detach()
        self.done = self.engine.update(self.cfg.optim.clip)
        self.steps += 1
        self.average.update(self.steps)

    def measure(self, policy: Policy, device: Device) -> Measured:
        apply_recompute(self.backbone, policy)
        self.backbone.zero_grad(set_to_none=True)  # a case that failed may have left some
        release()
        for _ in range(2):
            self.step()
        loss = float(self.loss)
        if not (math.isfinite(loss) and bool(self.done.applied)):
            raise ArithmeticError(f"a loss of {loss}, gradients of norm {float(self.done.grad_norm)}")
        _, peak = device.peak(self.step)
        if device.rehearsing:
            return Measured(peak, peak, 0, device.pace(self.step, 1), loss)
        reserved = torch.cuda.memory_reserved()
        free, total = torch.cuda.mem_get_info()
        return Measured(peak, reserved, total - free - reserved, device.pace(self.step, STEPS), loss)


@contextmanager
def training(name: str, batch: int, side: int, words: Sequence[str], place: World) -> Iterator[Training]:
    """A model in its engine; at the end all that it held is given back."""
    with ExitStack() as closing:
        built = Training(name, batch, side, words, place)
        closing.callback(release)
        closing.callback(lambda: built.engine.close())
        yield built


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def attempt(what: str, action: Callable[[], Measured]) -> Measured | str:
    """Return what was measured, or in a word why not."""
    try:
        return action()
    except torch.OutOfMemoryError as error:
        say(f"{what}: {str(error).splitlines()[0]}")
        return "out of memory"
    except Exception as error:  # noqa: BLE001 the other rows are worth their time all the same
        traceback.print_exc()
        return type(error).__name__


def row(name: str, policy: Policy, found: Measured | str, expected: Memory, planned_ms: float) -> list[str]:
    plan = f"{expected.allocated / 2**30:.2f}"
    if isinstance(found, str):
        return [name, policy, found, plan, "", "", "", "", f"{planned_ms:.1f}", ""]
    return [
        name,
        policy,
        f"{found.allocated / 2**30:.2f}",
        plan,
        f"**{expected.allocated / found.allocated:.3f}**",
        f"{found.reserved / 2**30:.2f}",
        f"{found.outside / 2**30:.2f}",
        f"{found.step:.1f}",
        f"{planned_ms:.1f}",
        f"{found.loss:.3f}",
    ]


def rows_of(
    name: str,
    policies: Sequence[Policy],
    batch: int,
    side: int,
    words: Sequence[str],
    place: World,
    device: Device,
) -> list[tuple[list[str], Measured | str]]:
    """Measure one model under each policy, the one with the least memory first."""
    kind = _kind(place)
    rows: list[tuple[list[str], Measured | str]] = []
    failed = "not tried"
    with ExitStack() as closing:
        built: Training | None = None
        try:
            built = closing.enter_context(training(name, batch, side, words, place))
        except torch.OutOfMemoryError:
            failed = "no room for weights and moments"
        except Exception as error:  # noqa: BLE001 the other models are worth their time all the same
            traceback.print_exc()
            failed = type(error).__name__
        for policy in policies:
            job = Job(
                load([f"model.name={name}", f"data.global_batch={batch}", f"data.image_size={side}", *words]),
                place.size,
                kind,
                CLASSES,
            )
            expected = memory(job, policy, batch)
            planned_ms = 1e3 * cost(job, policy, batch, Place(8, 50.0)).step
            found: Measured | str = failed
            if built is not None:
                found = attempt(f"{name}, {policy}", lambda p=policy, b=built: b.measure(p, device))  # type: ignore[misc]
            rows.append((row(name, policy, found, expected, planned_ms), found))
            say(" ".join(rows[-1][0]))
    return rows


def _kind(place: World) -> Kind:
    name = torch.cuda.get_device_name(place.device) if place.device.type == "cuda" else "H200"
    found = next((gpu for gpu in GPUS if gpu.called in name), None)
    if found is None:
        sys.exit(f"memory_gpu.py: {name} is not in vmamba_dist/core/gpus.py; add its row")
    return found


def largest(words: Sequence[str], batch: int, side: int, place: World, device: Device) -> list[str]:
    """Try models from the largest down, recomputing blocks, until one trains."""
    rows = []
    for name in BY_SIZE if not device.rehearsing else ("vmamba_femto", "vmamba_atto"):
        cells, found = rows_of(name, ["block"], batch, side, words, place, device)[0]
        rows.append(cells)
        if isinstance(found, Measured):
            break
    return [
        f"The largest model that trains on this device with parallel.recompute=block and {batch} samples at once: the "
        "last row.",
        "",
        *table(COLUMNS, rows),
    ]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="key=value, for example parallel.engine=fsdp")
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=tuple(reversed(POLICIES)))
    parser.add_argument("--batch", type=int, default=32, help="samples at once (default 32)")
    parser.add_argument(
        "--largest-batch", type=int, default=8, help="for the largest that trains (default 8; 0: do not look)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the table there too")
    parser.add_argument(
        "--rehearse", action="store_true", help=argparse.SUPPRESS
    )  # on a CPU, figures mean nothing
    args = parser.parse_args()
    if not (torch.cuda.is_available() or args.rehearse):
        sys.exit("memory_gpu.py needs a CUDA device; there is none here")
    device: Device = Rehearsal() if args.rehearse else Gpu()
    models, side = args.models, 224
    if args.rehearse:
        models, side = ("vmamba_atto",), 32
    cfg = load(args.words)
    engine = cfg.parallel.engine + (
        f"{cfg.parallel.zero_stage or 2}" if cfg.parallel.engine == "deepspeed" else ""
    )
    chosen = "cpu" if args.rehearse else "cuda"
    folders = [*([] if args.rehearse else [RESULTS]), *([args.out] if args.out else [])]
    lines = [
        f"One training step (forward, cross-entropy, backward, clipping, AdamW, average), {args.batch} samples of "
        f"{side} px, {cfg.precision.compute}, {' '.join(args.words) or 'parallel.engine=ddp'}, one process. "
        "Planned is what `vmamba plan` counts. Held by the allocator: after the step. Outside: the CUDA context "
        f"and what else stands on the device. The step is the mean of {STEPS} in a row. The loss is "
        "the second step's, against targets that are the same for every class: ln(1000) is 6.908.",
        "",
    ]
    rows: list[list[str]] = []

    def write(*more: str) -> None:
        name = f"memory_recompute_{engine}_gpu"
        body = [*lines, *table(COLUMNS, rows), *more]
        publish(name, "Peak memory by model and recompute policy", body, folders)

    with world(chosen, alone_too=cfg.parallel.engine != "ddp") as place:
        for name in models:
            rows += [
                cells
                for cells, _ in rows_of(name, args.policies, args.batch, side, args.words, place, device)
            ]
            write()  # a run that is cut short has what it measured
        if args.largest_batch:
            write("", *largest(args.words, args.largest_batch, side, place, device))


if __name__ == "__main__":
    main()
