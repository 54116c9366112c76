"""The points of a sweep are all checked, by name, before the first one starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmamba_dist.cluster import sweep
from vmamba_dist.cluster.points import Branch, Point, from_csv, grid, plan, point
from vmamba_dist.config import Config, ConfigError, load, load_beside, to_yaml


def names(points: list[Point]) -> list[str]:
    return [each.name for each in points]


def test_a_grid_is_every_combination_in_order() -> None:
    points = grid({"optim.lr": [1e-3, 1e-5], "model.name": ["vmamba_atto", "vmamba_pico"]})
    assert names(points) == [
        "lr=0.001,name=vmamba_atto",
        "lr=0.001,name=vmamba_pico",
        "lr=1e-05,name=vmamba_atto",
        "lr=1e-05,name=vmamba_pico",
    ]
    assert points[3].words == ("optim.lr=1e-05", "model.name=vmamba_pico")


def test_a_point_is_the_base_with_its_own_values_and_directory(tmp_path: Path) -> None:
    base = load(["run.seed=3", "optim.lr=9", "schedule.epochs=7"])
    values = [[0.9, 0.95], [0.8, 0.99]]
    one, two = plan(grid({"optim.betas": values}), base, tmp_path / "a b")
    assert one.config.optim.betas == (0.9, 0.95)
    assert two.config.optim.betas == (0.8, 0.99)
    assert (one.config.run.seed, one.config.schedule.epochs) == (3, 7)
    assert one.run == tmp_path / "a b" / "betas=_0.9_0.95_"


@pytest.mark.parametrize(
    "value", ["a b", "a: b", "$(rm -r x)", "'quoted'", '"', "null", "1e-3", "ä,b", "#", "[1]", " x"]
)
def test_any_text_reaches_its_point_unchanged(value: str, tmp_path: Path) -> None:
    (one,) = plan([point({"data.train": value})], Config(), tmp_path)
    assert one.config.data.train == value
    assert one.run.parent == tmp_path
    (tmp_path / "point.yaml").write_text(to_yaml(one.config))
    assert load([f"config={tmp_path / 'point.yaml'}"]) == one.config


def test_keys_are_called_by_their_last_part_where_that_tells_them_apart() -> None:
    (one,) = grid({"data.split": ["train"], "eval.split": ["val"], "optim.lr": [1.0]})
    assert one.name == "data.split=train,eval.split=val,lr=1"


def test_a_long_name_is_cut_and_stays_its_own() -> None:
    first, second = grid({"data.train": ["x" * 300, "x" * 299 + "y"]})
    assert len(first.name) == 120
    assert first.name != second.name


def test_a_table_of_points_leaves_out_empty_cells_and_may_name_them(tmp_path: Path) -> None:
    file = tmp_path / "points.csv"
    file.write_text('name,optim.lr,optim.betas\nslow,1e-4,\n,2e-4,"[0.9, 0.95]"\n\nbase,,\n')
    slow, fast, base = from_csv(file)
    assert slow == Point("slow", ("optim.lr=0.0001",))
    assert fast == Point("lr=0.0002,betas=_0.9_0.95_", ("optim.lr=0.0002", "optim.betas=[0.9, 0.95]"))
    assert base == Point("base", ())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["sweep.optim.lrr=[1]"], r"sweep\.optim\.lrr: no such key; did you mean optim\.lr\?"),
        (["sweep.optim.lr=[]"], r"sweep\.optim\.lr=\[\]: an empty list has no point"),
        (["sweep.optim.lr=1e-3"], r"sweep\.optim\.lr=0\.001: give a list"),
        (["sweep.optim.lr=[1e-3,0.001]"], r"the points lr=0\.001 and lr=0\.001 are the same run"),
        (["sweep.optim.lr=[-1]"], r"point lr=-1: optim\.lr=-1\.0: use more than 0"),
        (["sweep.model.name=[vmamba_atoo]"], r"point name=vmamba_atoo: .*did you mean vmamba_atto"),
        (
            ["sweep.data.train=[a/b,a_b]"],
            r"two points would share the directory .*train=a_b: data.train=a/b and",
        ),
        (["sweep.run.dir=[a,b]"], r"sweep\.run\.dir: not a key to sweep"),
        (
            ["sweep.launch.nodes=[1,2]"],
            r"sweep\.launch\.nodes: not a key to sweep: all points are launched alike",
        ),
        (["sweep.optim.lr=[1]", "sweep.parallel=0"], r"sweep\.parallel=0: points at a time"),
        (["sweep.optim.lr=[1", "sweep.parallel=2"], r"the config cannot be read"),
        (["sweep.parallel=2"], r"nothing to sweep"),
        (["sweep.points=no.csv"], r"sweep\.points=no\.csv: No such file"),
        (["sweep.points=no.csv", "sweep.optim.lr=[1]"], r"sweep\.points=no\.csv beside sweep\.optim\.lr"),
        (["swep.optim.lr=[1]"], r"swep=.*unknown key"),
        (["sweep=3"], r"sweep=3: this is a group"),
        (
            ["sweep.optim.lr=[1.0,1]", "sweep.optim.eps=[1e-8]"],
            r"the points lr=1,eps=1e-08 and .* are the same run",
        ),
    ],
)
def test_a_mistake_is_told_by_name(words: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        sweep.main([f"run.dir={tmp_path / 'sweep'}", *words])
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no points"),
        ("optim.lr\n", "no points"),
        ("optim.lr,optim.lr\n1,2\n", "a column twice"),
        ("optim.lr,optim.clip\n1\n", "point 1 has 1 cells for 2 keys"),
        ("optim.llr\n1\n", r"column optim\.llr: no such key; did you mean optim\.lr"),
        ("name,optim.lr\na,1\na,2\n", "two points would share the directory"),
        ("name,optim.lr\n../a,1\n", "a point cannot be called"),
        ("name,optim.lr\npoints,1\n", "a point cannot be called"),
        ("name,optim.lr\na,1\nb,1.0\n", "the points a and b are the same run"),
    ],
)
def test_a_mistake_in_a_table_is_told_by_name(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "points.csv"
    file.write_text(text)
    with pytest.raises(ConfigError, match=says):
        sweep.main([f"run.dir={tmp_path / 'sweep'}", f"sweep.points={file}"])


def test_a_branch_begins_in_another_point(tmp_path: Path) -> None:
    trunk = Point("trunk", ("schedule.epochs=2",))
    _, short = plan([trunk, Point("short", ("schedule.epochs=1",), Branch("trunk", 12))], Config(), tmp_path)
    assert short.config.run.resume == str(tmp_path / "trunk/checkpoints/step-000000012")
    with pytest.raises(ConfigError, match="branches from trunk, which is no point"):
        plan([Point("short", (), Branch("trunk", 12))], Config(), tmp_path)
    ring = [Point(name, (f"run.seed={i}",), Branch("bca"[i], 1)) for i, name in enumerate("abc")]
    with pytest.raises(ConfigError, match="begin in each other's checkpoints: a, b, c"):
        plan(ring, Config(), tmp_path)


def test_a_value_and_a_group_may_have_one_name_in_a_group_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text("optim: {lr: 2}\nsweep:\n  optim: {lr: [1, 2]}\n  parallel: 3\n")
    words = [f"config={file}", "sweep.parallel.engine=[ddp,fsdp]", "optim.clip=1", "sweep.optim.lr=[3]"]
    config, said = load_beside(words, "sweep")
    assert (config.optim.lr, config.optim.clip) == (2, 1)
    assert said == {"optim.lr": [3], "parallel": 3, "parallel.engine": ["ddp", "fsdp"]}
    with pytest.raises(ConfigError, match=r"sweep\.…: this group is for python launch/sweep\.py"):
        load([f"config={file}"])


def test_a_dry_run_lists_the_points_and_does_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sweep"
    assert (
        sweep.main([f"run.dir={folder}", "sweep.optim.lr=[1e-3,2e-3]", "--dry-run", "sweep.parallel=2"]) == 0
    )
    out = capsys.readouterr().out
    assert "lr=0.001  missing  optim.lr=0.001" in out
    assert f"2 points, 2 at a time, below {folder}" in out
    assert not folder.exists()


def test_gpus_are_dealt_to_the_points_that_run_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load(["launch.gpus_per_node=2"])
    planned = plan(grid({"optim.lr": [1, 2, 3]}), base, tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7,8")
    assert sweep.devices(sweep.Sweep(tmp_path, planned, 2, "")) == ["4", "5", "6", "7", "8"]
    with pytest.raises(
        ConfigError, match=r"sweep\.parallel=3 × launch\.gpus_per_node=2 .* use sweep\.parallel=2"
    ):
        sweep.devices(sweep.Sweep(tmp_path, planned, 3, ""))


def test_without_a_view_of_the_queue_nothing_is_queued_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="the queue cannot be seen from here"):
        sweep.main([f"run.dir={tmp_path / 'sweep'}", "sweep.optim.lr=[1]", "launch.cluster=slurm"])
