"""What each engine costs: a training step of it in turn with DDP's (in one process: with none).

Law: an engine and DDP stand in the same processes, are fed the same micro-batch and take turns; a ratio is the median
over rounds of theirs, so that what slows the machine for a while slows both. Started by torchrun for several processes,
where DDP over gloo or NCCL is the yardstick, or by python for one, where plain DDP wraps nothing.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from gpu import Device, Gpu, Rehearsal
from memory_gpu import Training, training
from report import RESULTS, publish, table

from vmamba_dist.config import load
from vmamba_dist.core.dist import World, agree, world

ENGINES: dict[str, tuple[str, ...]] = {
    "fsdp": ("parallel.engine=fsdp",),
    "hsdp": ("parallel.engine=fsdp", "parallel.shard_size=1"),
    "zero1": ("parallel.engine=deepspeed", "parallel.zero_stage=1"),
    "zero2": ("parallel.engine=deepspeed", "parallel.zero_stage=2"),
    "zero3": ("parallel.engine=deepspeed", "parallel.zero_stage=3"),
}


class OnCpu(Rehearsal):
    """A CPU that is what is measured."""

    rehearsing = False


def pair(
    plain: Training, other: Training, device: Device, count: int, steps: int
) -> tuple[float, float, float]:
    """Time both engines' steps in turn; return the medians of either, in ms a step, and of their ratio."""
    times: list[tuple[float, float]] = []
    for _ in range(count + 1):
        taken = []
        for one in (plain, other):
            agree(True)  # all ranks begin together
            taken.append(device.pace(one.step, steps))
        times.append((taken[0], taken[1]))
    kept = times[1:]  # the first warms up: kernels are compiled, buffers made
    ratio = statistics.median(b / a for a, b in kept)
    return statistics.median(a for a, _ in kept), statistics.median(b for _, b in kept), ratio


def peak(one: Training, device: Device) -> str:
    """MiB that a step needs beside what is held when it begins, on a GPU."""
    if isinstance(device, Rehearsal):
        return ""
    before, most = device.peak(one.step)
    return f"{(most - before) / 2**20:,.0f}"


def row(name: str, words: Sequence[str], args: argparse.Namespace, place: World, device: Device) -> list[str]:
    with ExitStack() as closing:
        plain, other = (
            closing.enter_context(training(args.model, args.batch, args.side, [*args.words, *more], place))
            for more in ((), words)
        )
        a, b, ratio = pair(plain, other, device, args.rounds, args.steps)
        return [
            name,
            f"{b:.2f}",
            f"{a:.2f}",
            f"{100 * (ratio - 1):+.1f} %",
            peak(other, device),
            peak(plain, device),
        ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "words", nargs="*", help="key=value for every engine, for example precision.compute=float32"
    )
    parser.add_argument("--model", default="vmamba_base_s1l20")
    parser.add_argument("--side", type=int, default=224, help="px (default 224)")
    parser.add_argument("--batch", type=int, default=64, help="samples a process (default 64)")
    parser.add_argument("--engines", nargs="+", choices=tuple(ENGINES), default=tuple(ENGINES))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="in a row, a round")
    parser.add_argument("--name", default="engines", help="of the table's file")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the table there too")
    args = parser.parse_args(argv)
    cuda = torch.cuda.is_available()
    device: Device = Gpu() if cuda else OnCpu()
    with world("cuda" if cuda else "cpu", alone_too=True) as place:
        if cuda:
            device.device = place.device
        names = [name for name in args.engines if place.size > 1 or name != "hsdp"]  # one rank is one shard
        cells = []
        for name in names:
            cells.append(row(name, ENGINES[name], args, place, device))
            if place.is_main:
                print(*cells[-1], file=sys.stderr, flush=True)
        if place.is_main:
            link = "NCCL" if cuda else "gloo"
            where = "one process" if place.size == 1 else f"{place.size} processes over {link}"
            compute = load(args.words).precision.compute
            lines = [
                f"One training step (forward, cross-entropy, backward, clipping, AdamW, average) of {args.model}, "
                f"{args.batch} samples of {args.side} px a process, {compute}, {where}. Medians of {args.rounds} "
                f"rounds in turn of {args.steps} steps; overhead is the median of a round's ratio to ddp, which in one "
                "process wraps nothing. hsdp: a whole copy a process. Peak: what is allocated in a step beside what is "
                "held when it begins.",
                "",
                *table(("engine", "step, ms", "ddp's", "overhead", "peak of a step, MiB", "ddp's"), cells),
            ]
            folders = [RESULTS, *([args.out] if args.out else [])]
            publish(args.name, "What each engine costs a step", lines, folders)
        agree(True)


if __name__ == "__main__":
    main()
