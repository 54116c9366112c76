"""Every pinned configuration compiles for sm_80 and sm_90, and spills no register that ALLOWED_SPILLS does not name.

No GPU is needed. The compiler cannot run where the interpreter does, so the tests run this file as a script in
processes of their own; by hand it prints the whole table: `python tests/kernels/test_pinned.py`.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.append(str(Path(__file__).parents[2] / "kernels"))  # as a script

from vmamba_kernels.ss2d import fused, pinned, tiles
from vmamba_kernels.testing import ImageShape

MODULES = (
    "vmamba_kernels.rows.pinned",
    "vmamba_kernels.ss2d.pinned",
    "vmamba_kernels.scan.triton_fwd",
    "vmamba_kernels.scan.triton_bwd",
)
TARGETS = (80, 90)
# A configuration's name begins with -> the bytes of stack a thread may use, and why. The longest match counts.
REGISTER_BOUND = "register-bound: see docs/kernels.md"
ALLOWED_SPILLS: dict[str, tuple[int, str]] = {
    "ss2d_gradients bf16 C96 ": (72, REGISTER_BOUND),
    "ss2d_gradients bf16 C192 R12 N1 ": (88, REGISTER_BOUND),
    "ss2d_gradients bf16 C384 ": (72, REGISTER_BOUND),
    "ss2d_gradients bf16 C768 ": (272, "capped at 168 registers: .096 ms for .104 in stage 4"),
    "ss2d_gradients bf16 C192 R6 N16 ": (1072, f"untimed since it was 664; {REGISTER_BOUND}"),
    "ss2d_gradients fp32 C96 ": (496, REGISTER_BOUND),
    "ss2d_output bf16 C96 ": (8, "with Triton 3.6 alone"),
    "ss2d_output bf16 C192 R12 ": (16, "capped at 168 registers: .200 ms for .205 in stage 2"),
    "ss2d_output bf16 C192 R6 N16 ": (296, f"untimed since it was 64; {REGISTER_BOUND}"),
    "ss2d_output bf16 C384 ": (80, "capped at 168 registers: .102 ms for .109 in stage 3"),
    "ss2d_output bf16 C768 ": (
        160,
        "capped at 168 registers: .053 ms for .075 in stage 4, .111 for .119 at 1024 px",
    ),
    "ss2d_weight_product bf16 C768 ": (8, "with Triton 3.6 alone, and on sm_80"),
}


def without_generation(name: str) -> str:
    """A configuration's name without the generation that it is for."""
    return re.sub(r" sm_\d+\b", "", name)


def allowed(name: str) -> int:
    name = without_generation(name)
    matching = [prefix for prefix in ALLOWED_SPILLS if name.startswith(prefix)]
    return ALLOWED_SPILLS[max(matching, key=len)][0] if matching else 0


def collect() -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """Return every module's pinned configurations."""
    return [configuration for name in MODULES for configuration in importlib.import_module(name).pinned()]


def compile_part(part: int, of: int, targets: list[int]) -> None:
    """Compile each of-th configuration for each target and print what it uses."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    # The slowest kernels first, dealt round: the processes end together.
    jobs = [(target, c) for target in targets for c in collect() if _concerns(c[0], target)]
    jobs.sort(key=lambda job: (job[1][1].__name__ != "ss2d_gradients", job[1][0], job[0]))
    for target, (name, kernel, types, constants, chosen) in jobs[part::of]:
        begin = time.perf_counter()
        names = kernel.arg_names
        if "EARLY" in constants and target >= 90:
            constants = constants | {"EARLY": 2}
        # What a launch tells Triton: torch's memory begins at a multiple of 16 bytes.
        attributes = {
            (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if types.get(n, "").startswith("*")
        }
        signature = {n: types.get(n, "constexpr") for n in names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
        options = {"num_stages": 3} | chosen
        compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = subprocess.run(
                [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
            ).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        assert found, usage
        seconds = time.perf_counter() - begin
        row = [
            target,
            name,
            int(found[1]),
            int(found[2]),
            chosen["num_warps"],
            compiled.metadata.shared,
            seconds,
        ]
        print(json.dumps(row), flush=True)


def _concerns(name: str, target: int) -> bool:
    """A row of a table is for one generation; every other configuration may run on any."""
    generations = re.findall(r"\bsm_(\d+)\b", name)
    return not generations or str(target) in generations


def measure(*targets: int, processes: int = 2) -> list[list[Any]]:
    """Compile everything in processes of their own and return the rows that they print."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    parts = [
        subprocess.Popen(
            [sys.executable, __file__, str(part), str(processes), *map(str, targets)],
            env=environment | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for part in range(processes)
    ]
    outputs = [part.communicate()[0] for part in parts]
    assert all(part.returncode == 0 for part in parts)
    return sorted(json.loads(line) for output in outputs for line in output.splitlines())


def show(rows: list[list[Any]]) -> str:
    lines = [f"{'target':6} {'registers':>9} {'spilled':>7} {'warps':>5} {'shared':>6} {'s':>5}  name"]
    for target, name, registers, spilled, warps, shared, seconds in rows:
        lines.append(f"sm_{target:<3} {registers:9} {spilled:7} {warps:5} {shared:6} {seconds:5.1f}  {name}")
    return "\n".join(lines)


def excessive(rows: list[list[Any]]) -> dict[str, str]:
    """Return by configuration what it spills beyond what is allowed."""
    return {
        f"sm_{target} {name}": f"{spilled} bytes spilled, {allowed(name)} allowed"
        for target, name, _, spilled, *_ in rows
        if spilled > allowed(name)
    }


@pytest.mark.timeout(1200)
def test_no_configuration_spills_anything_new():
    """And no allowance is left that nothing needs."""
    rows = measure(*TARGETS)
    print(show(rows))
    assert {(row[0], row[1]) for row in rows} == {
        (t, c[0]) for t in TARGETS for c in collect() if _concerns(c[0], t)
    }
    assert excessive(rows) == {}
    version = ".".join(triton.__version__.split(".")[:2])
    here = [
        p for p, (_, why) in ALLOWED_SPILLS.items() if "alone" not in why or f"Triton {version} alone" in why
    ]
    assert [
        p for p in here if not any(without_generation(r[1]).startswith(p) and r[3] > 0 for r in rows)
    ] == []


def test_pinned_names_are_unique():
    names = [c[0] for c in collect()]
    assert len(names) == len(set(names))


def test_each_generation_of_a_table_is_compiled(monkeypatch):
    """The same plan for two: neither stands for the other, and the default plan stands for both."""
    plan = tiles.Plan(span=14, steps=1, output=32, gradients=32, ends=32)
    keys = [tiles.Key(f"sm_{target}", 144, 784, 1, 2) for target in TARGETS]
    monkeypatch.setattr(tiles, "pinned_plans", lambda: dict.fromkeys(keys, plan))
    names = [c[0] for c in pinned.pinned() if "C144" in c[0]]
    assert len(names) == len(set(names)) > 0
    assert [sum(_concerns(name, target) for name in names) for target in TARGETS] == [len(names) // 2] * 2
    assert allowed("ss2d_gradients sm_90 bf16 C96 R6") == allowed("ss2d_gradients bf16 C96 R6") > 0


@pytest.mark.parametrize(("channels", "rank", "length"), pinned.STAGES)
def test_what_a_launch_passes_is_pinned(channels, rank, length, monkeypatch):
    """The list repeats what the host side computes: every launch of VMamba-T's stages must be on it."""
    launched = []

    class Noted:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            return self.note

        def note(self, *args: Any, **constants: Any) -> None:
            options = {n: constants.pop(n) for n in ("num_warps", "num_stages", "maxnreg") if n in constants}
            names = self.kernel.arg_names
            positional = dict(zip(names, args, strict=False))
            constants |= {n: v for n, v in positional.items() if isinstance(v, int) and v == 1}
            types = {n: _type(v) for n, v in positional.items() if n not in constants}
            launched.append((self.kernel.__name__, types, constants, options))

    for name in fused.KERNELS:
        monkeypatch.setattr(fused, name, Noted(getattr(fused, name)))
    monkeypatch.setattr(fused, "interpreted", lambda: False)
    monkeypatch.setattr(tiles, "pinned_plans", dict)
    side = round(length**0.5)
    batch = 4 if length > 49 else 24  # a number that is 1 would be a constant: the groups of tokens
    inputs = ImageShape(batch, side, side, channels, rank).inputs()
    x, dy = inputs["x"].bfloat16(), inputs["dy"].bfloat16()
    projected = torch.nn.functional.pad(
        inputs["projected"].bfloat16().unflatten(-1, (4, -1)), (0, -(rank + 2) % 8)
    ).flatten(-2)
    others = [inputs["dt_weight"].bfloat16(), *(inputs[name].float() for name in ("dt_bias", "A", "D"))]
    for save in (True, False):
        y, saved = fused.forward(x, projected, *others, "cross2d", save)
        assert y.shape == x.shape
        if save:
            fused.backward(dy, saved, x, projected, *others, "cross2d")
    x_proj = torch.zeros(4 * (rank + 2), channels)
    made = fused.weights(x_proj, inputs["dt_weight"].float(), inputs["A"].float(), torch.bfloat16)
    fused.weight_gradients(*made[:2], made[2], made[2], torch.float32)
    listed = [(c[1].__name__, *c[2:]) for c in pinned.pinned()]
    assert len(launched) == 2 * 4 + (7 if channels > 512 else 6) + 2
    for launch in launched:
        assert launch in listed, launch


def _type(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return "i32"
    return {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32"}[value.dtype]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        part, of, *targets = map(int, sys.argv[1:])
        compile_part(part, of, targets)
    else:
        print(show(measure(*TARGETS)))
