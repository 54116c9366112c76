"""The house keeps its shape: imports point one way, and what must not exist does not."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted([*(ROOT / "vmamba_dist").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
SCRIPTS = sorted((ROOT / "launch").glob("*.py"))
OURS = ("vmamba_dist", "vmamba_kernels")
RANK_VARIABLES = {"RANK", "WORLD_SIZE"}
# torch reads its environment when it loads, and a submitter needs no torch: these import after the fact.
LATE_IMPORTS = {"vmamba_dist/cluster/job.py", "vmamba_dist/cluster/submit.py"}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def table() -> dict[str, set[str]]:
    """The rows of CONTRIBUTING.md's import table: room → rooms that it may import."""
    rows = re.findall(r"^\| (\w+) \|[^|]*\|([^|]*)\|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    return {room: set(re.findall(r"\w+", names)) for room, names in rows if room != "room"}


def room(module: str) -> str:
    """vmamba_dist.train.loop → train; vmamba_kernels.scan.op → vmamba_kernels; vmamba_dist itself → ""."""
    first, *rest = module.split(".")
    return first if first == "vmamba_kernels" else rest[0] if rest else ""


def module_name(path: Path) -> str:
    parts = (
        path.relative_to(ROOT / "kernels" if "vmamba_kernels" in path.parts else ROOT).with_suffix("").parts
    )
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at any depth; `from vmamba_dist import cluster` names the room."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno}: write imports in full"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from names if node.module == "vmamba_dist" else [str(node.module)]


def environment_reads(tree: ast.AST) -> Iterator[str]:
    """Names of environment variables that the code reads by a literal."""
    for node in ast.walk(tree):
        key: ast.expr | None = None
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            key = node.slice
        elif isinstance(node, ast.Call) and node.args:
            function = node.func
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            key = node.args[0] if name in {"get", "getenv", "pop", "setdefault"} else None
        if isinstance(key, ast.Constant) and isinstance(key.value, str):
            yield key.value


def test_the_table_knows_every_room() -> None:
    rooms = {room(module_name(path)) for path in MODULES} - {""}
    assert rooms == set(table())


def test_the_table_has_no_cycle() -> None:
    allowed = table()
    done: set[str] = set()
    while ready := {name for name in allowed if name not in done and allowed[name] <= done}:
        done |= ready
    assert done == set(allowed), f"a cycle among {set(allowed) - done}"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_point_one_way(path: Path) -> None:
    own = room(module_name(path))
    used = {room(name) for name in imports(path) if name.split(".")[0] in OURS} - {"", own}
    assert used <= table().get(own, set()), (
        f"{relative(path)} may not import {used - table().get(own, set())}"
    )


@pytest.mark.parametrize("path", [p for p in MODULES if "vmamba_kernels" in p.parts], ids=relative)
def test_the_kernels_need_torch_and_triton_only(path: Path) -> None:
    others = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)
    assert others <= {"torch", "triton", "vmamba_kernels"}


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_only_dist_reads_the_rank(path: Path) -> None:
    read = set(environment_reads(ast.parse(path.read_text()))) & RANK_VARIABLES
    assert not read or relative(path) == "vmamba_dist/core/dist.py"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_stand_at_the_top(path: Path) -> None:
    functions = (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef))
    late = [n.lineno for f in functions for n in ast.walk(f) if isinstance(n, ast.Import | ast.ImportFrom)]
    assert not late or relative(path) in LATE_IMPORTS


@pytest.mark.parametrize("path", [p for p in MODULES if p.read_text().strip()], ids=relative)
def test_a_module_opens_with_its_law(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())) or relative(path) == "vmamba_dist/__init__.py"


def test_there_is_no_drawer_of_odds_and_ends() -> None:
    drawers = {"utils.py", "util.py", "helpers.py", "misc.py", "common.py"}
    assert not [relative(path) for path in MODULES if path.name in drawers]


@pytest.mark.parametrize("folder", ["launch", "configs", "kernels"])
def test_plain_folders_are_no_packages(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("path", SCRIPTS, ids=relative)
def test_launch_scripts_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 20


def test_no_path_of_one_machine_is_written_down() -> None:
    folders = ("vmamba_dist", "kernels", "launch", "configs", "tests", "benchmarks", ".ci")
    suffixes = {".py", ".sh", ".yaml", ".toml", ".md", ".json", ""}
    files = [p for f in folders for p in (ROOT / f).rglob("*") if p.is_file() and p.suffix in suffixes]
    files += [p for p in ROOT.iterdir() if p.is_file() and p.suffix in suffixes and p.name != ".git"]
    homes = re.compile("/(?:" + "|".join(("home", "root", "work", "Users", "mnt")) + ")/[A-Za-z]")
    found = [
        relative(p)
        for p in files
        if "__pycache__" not in p.parts and homes.search(p.read_text(errors="replace"))
    ]
    assert not found


def test_the_command_line_loads_no_torch() -> None:
    code = (
        "import sys, vmamba_dist.cli, vmamba_dist.doctor, vmamba_dist.scaling.submit, vmamba_dist.cluster.local\n"
        "heavy = {'torch', 'torchvision', 'triton', 'deepspeed', 'timm', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)
