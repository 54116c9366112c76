"""A kernel is launched again only with what it was compiled for. What compiles is Triton's; here a stand-in counts."""

from typing import Any

import pytest
import torch

from vmamba_kernels import launch, rows, ss2d_scan
from vmamba_kernels.launch import own_code, unobserved


class Compiled:
    """What Triton's launch hands back."""

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []

    def run(self) -> None:
        """Its presence says that there is something to launch again."""

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *args: self.launched.append((grid, args))


class Kernel:
    """Compiles anew whenever it is asked, as Triton's own launch may."""

    arg_names = ("p_x", "count", "C", "ROWS")

    def __init__(self) -> None:
        self.made: list[Compiled] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def first(*args: Any, **constants: Any) -> Compiled:
            self.made.append(Compiled())
            return self.made[-1]

        return first


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_compiled", {})


def test_the_same_kind_goes_straight_to_what_was_compiled() -> None:
    kernel, x = Kernel(), torch.zeros(64)
    for grid in ((4,), (4,), (7, 2)):
        launch.launch(kernel, grid, (x, 5), {"ROWS": 2, "C": 3, "num_warps": 1})
    assert len(kernel.made) == 1
    assert [grid for grid, _ in kernel.made[0].launched] == [(4, 1, 1), (7, 2, 1)]
    assert all(args[1:] == (5, 3, 2) for _, args in kernel.made[0].launched)  # in the kernel's own order


@pytest.mark.parametrize(
    ("args", "constants"),
    [
        ((torch.zeros(64), 6), {}),
        ((torch.zeros(64, dtype=torch.bfloat16), 5), {}),
        ((torch.zeros(65)[1:], 5), {}),  # its address is no multiple of 16
        ((torch.zeros(64), 5), {"C": 4}),
        ((torch.zeros(64), 5), {"num_warps": 2}),
    ],
    ids=["number", "type", "address", "constant", "warps"],
)
def test_another_kind_is_triton_s_to_compile(args: tuple[Any, ...], constants: dict[str, int]) -> None:
    kernel = Kernel()
    usual = {"ROWS": 2, "C": 3, "num_warps": 1}
    launch.launch(kernel, (4,), (torch.zeros(64), 5), usual)
    launch.launch(kernel, (4,), args, usual | constants)
    assert len(kernel.made) == 2


def test_kinds_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MOST_KEPT", 3)
    kernel = Kernel()
    for n in range(10):
        launch.launch(kernel, (1,), (torch.zeros(4), n), {"ROWS": 2, "C": 3})
    assert len(launch._compiled) <= 3


def test_an_op_s_own_code_is_taken_where_nobody_listens() -> None:
    from torch._subclasses import FakeTensorMode

    x = torch.ones(2, 4)
    assert unobserved(x)
    with FakeTensorMode() as mode:
        assert not unobserved(x)
        assert not unobserved(mode.from_tensor(x))
    y, _ = own_code(rows.norm)(x, torch.ones(4), torch.zeros(4), 1e-5, torch.float32)
    assert torch.equal(y, rows.layer_norm(x, torch.ones(4), torch.zeros(4), 1e-5, torch.float32))
    with pytest.raises(AttributeError):
        own_code(ss2d_scan)
