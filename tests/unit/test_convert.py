"""Checkpoints in other formats: what goes there and back is bit-equal, and nothing is lost without a word."""

import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from distributed.micro import train, words
from shardsets import make_set
from vmamba_dist.checkpoint import command, dcp, formats, store
from vmamba_dist.checkpoint.convert import convert, main
from vmamba_dist.checkpoint.save import Checkpoints
from vmamba_dist.checkpoint.store import CheckpointError, Meta
from vmamba_dist.config import load, to_dict, trajectory
from vmamba_dist.config.schema import CheckpointConfig, ConfigError
from vmamba_dist.core.dist import World
from vmamba_dist.core.rundir import RunDir
from vmamba_dist.core.state import TrainState
from vmamba_dist.models import create_model, export_official
from vmamba_dist.models.vmamba import VMamba
from vmamba_dist.objectives.classify import Classify

HERE = World(0, 1, 0, torch.device("cpu"))
MODEL, CLASSES, STEP = "vmamba_atto", 7, 12


def random_model(seed: int) -> VMamba:
    model = create_model(MODEL, num_classes=CLASSES)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=draw)
    return model


RAW, AVERAGE = random_model(1), random_model(2)


def state_of_a_run() -> dict[str, Tensor]:
    """Everything that a run of one process saves."""
    raw = Classify(RAW, seed=0).state_dict()
    average = Classify(AVERAGE, seed=0).state_dict()
    tensors = {f"model.{name}": t for name, t in raw.items()} | {f"ema.{n}": t for n, t in average.items()}
    draw = torch.Generator().manual_seed(3)
    for name, t in raw.items():
        tensors[f"optim.{name}.exp_avg"] = torch.randn(t.shape, generator=draw)
        tensors[f"optim.{name}.exp_avg_sq"] = torch.rand(t.shape, generator=draw)
        tensors[f"optim.{name}.step"] = torch.tensor(float(STEP))
    return tensors


def meta() -> Meta:
    config = load([f"model.name={MODEL}", "run.dir=/somewhere/private", "data.train=/data/private"])
    identity = trajectory(config) | {"num_classes (resolved)": CLASSES}
    state = TrainState(step=STEP, samples=STEP * 64, epoch=1, offset=64, lanes=4)
    extra = {"config": to_dict(config)}
    return Meta(STEP, STEP * 64, 1, state.to_dict(), 1, "ddp", "digest", identity, {"top1": 0.5}, extra)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    directory = RunDir.acquire(path)
    Checkpoints(directory, CheckpointConfig(), HERE).save(state_of_a_run(), meta())
    directory.release()
    return path


@pytest.fixture(scope="module")
def universal(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "universal"
    assert convert(run, folder).left == []
    return folder


def canonical(path: Path) -> tuple[dict[str, Tensor], Meta]:
    assert store.verify_checkpoint(path) == []
    reader = dcp.TensorReader(path)
    return {name: reader.read(name) for name in reader.index}, store.read_manifest(path).meta


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def weights(model: VMamba) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


# Weights alone


@pytest.mark.parametrize(("chosen", "expected"), [(None, AVERAGE), ("ema", AVERAGE), ("raw", RAW)])
def test_a_safetensors_file_has_the_models_own_names(
    run: Path, tmp_path: Path, chosen: str | None, expected: VMamba
) -> None:
    file = tmp_path / "weights.safetensors"
    convert(run, file, weights=chosen)
    assert same(load_file(file), weights(expected))
    create_model(MODEL, num_classes=CLASSES).load_state_dict(load_file(file))
    with safe_open(file, framework="pt") as opened:
        about = opened.metadata()
    assert (about["model"], about["num_classes"], about["weights"]) == (MODEL, str(CLASSES), chosen or "ema")
    assert about["format"] == "pt"
    assert "private" not in json.dumps(about)  # nobody's paths travel with weights


def test_the_file_is_laid_out_as_the_library_lays_it_out(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(3, dtype=torch.bfloat16),
        "b": torch.tensor(2**40),
        "c": torch.empty(0, 3),
        "d": torch.rand(2, 5).T,
    }
    chunks = {name: formats.whole(name, t.shape, t.dtype) for name, t in tensors.items()}
    formats.write_safetensors_file(tmp_path / "ours", chunks, tensors.__getitem__, {"k": "v"})
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "theirs", {"k": "v"})
    assert same(load_file(tmp_path / "ours"), tensors)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_come_back_as_a_state_to_start_from(run: Path, tmp_path: Path, suffix: str) -> None:
    """The weights bit-equal, an average that equals them, moments of zero, step 0; ready for run.resume=PATH."""
    file = tmp_path / f"weights{suffix}"
    convert(run, file, weights="raw")
    done = convert(file, tmp_path / "back")
    assert done.made == ["ema", "moments"]
    tensors, back = canonical(tmp_path / "back")
    before = state_of_a_run()
    assert tensors.keys() == before.keys()
    for name, tensor in tensors.items():
        kind, bare = name.split(".", 1)
        expected = torch.zeros_like(tensor) if kind == "optim" else before[f"model.{bare}"]
        assert torch.equal(tensor, expected), name
    assert (back.step, back.samples, back.state) == (0, 0, TrainState().to_dict())
    assert back.extra["config"]["model"] == meta().extra["config"]["model"]
    assert back.trajectory["num_classes (resolved)"] == CLASSES


def test_official_weights_have_official_names_and_shapes(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "official.pth"
    convert(run, file)
    content = torch.load(file, weights_only=True)
    assert same(content["model"], dict(export_official(AVERAGE)))
    assert "private" not in content[formats.ABOUT]


def test_official_weights_of_others_need_the_models_name(tmp_path: Path) -> None:
    """As published: raw weights, an average, and an optimizer's state that is of no use here."""
    file = tmp_path / "vssm.pth"
    raw, average = export_official(RAW), export_official(AVERAGE)
    content = {"model": raw, "model_ema": average, "optimizer": {"state": {}}, "epoch": 3}
    torch.save(content, file)
    with pytest.raises(ConfigError, match="does not say which model it is of; add --model NAME"):
        convert(file, tmp_path / "out")
    with pytest.raises(ConfigError, match="do not fit the model"):
        convert(file, tmp_path / "out", model="vmamba_femto")
    assert convert(file, tmp_path / "out", model=MODEL).made == ["moments"]
    tensors, _ = canonical(tmp_path / "out")
    before = state_of_a_run()
    for kind in ("model", "ema"):
        found = {n: t for n, t in tensors.items() if n.startswith(f"{kind}.")}
        assert same(found, {n: t for n, t in before.items() if n in found})
    # Bare weights, in the format before torch 1.6.
    torch.save(dict(raw), file, _use_new_zipfile_serialization=False)
    convert(file, tmp_path / "w.safetensors", model=MODEL)
    assert same(load_file(tmp_path / "w.safetensors"), weights(RAW))


class Intruder:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("was-here",)


@pytest.mark.parametrize("name", ["bad.pth", "bad.safetensors", "zero/a/fp32.pt"])
def test_a_file_that_would_run_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    if name.startswith("zero"):
        torch.save({"global_steps": Intruder()}, tmp_path / "mp_rank_00_model_states.pt")
        monkeypatch.setattr("vmamba_dist.checkpoint.universal._shapes", lambda *_: {"backbone.a": (1,)})
        file = tmp_path
        torch.save(torch.zeros(1), tmp_path / name)
    elif name.endswith(".pth"):
        torch.save({"model": {"w": torch.zeros(1)}, "x": Intruder()}, file)
    else:
        file.write_bytes(pickle.dumps(Intruder()))
    with pytest.raises(ConfigError, match=r"only tensors and plain values are read|no safetensors file"):
        convert(file, tmp_path / "out", model=MODEL)
    assert not (tmp_path / "was-here").exists()
    assert not (tmp_path / "out").exists()


# Whole states


def test_canonical_to_canonical_is_the_same_state_read_back(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "FILE_BYTES", 2**20)  # several files
    target = tmp_path / f"step-{STEP:09d}"
    done = convert(run / "checkpoints" / target.name, target)
    assert (done.made, done.left) == ([], [])
    tensors, back = canonical(target)
    assert same(tensors, state_of_a_run())
    assert back == meta()
    assert len(store.read_manifest(target).files) > 3
    with pytest.raises(ConfigError, match=f"is of step {STEP}; call it step-{STEP:09d}"):
        convert(run, tmp_path / "step-000000099")


def test_universal_there_and_back_loses_nothing(universal: Path, tmp_path: Path) -> None:
    convert(universal, tmp_path / "back")
    tensors, back = canonical(tmp_path / "back")
    assert same(tensors, state_of_a_run())
    assert back == meta()
    tag = (universal / "latest_universal").read_text()
    convert(universal / tag, tmp_path / "inner.safetensors", weights="raw")  # the inner folder is one too
    assert same(load_file(tmp_path / "inner.safetensors"), weights(RAW))


def test_universal_is_laid_out_as_deepspeed_reads_it(universal: Path) -> None:
    folder = universal / (universal / "latest_universal").read_text()
    assert folder.name == f"global_step{STEP}_universal"
    before = state_of_a_run()
    for bare, parameter in Classify(RAW, seed=0).named_parameters():
        at = folder / "zero" / bare
        for file, name in {"fp32": f"model.{bare}", "exp_avg": f"optim.{bare}.exp_avg"}.items():
            content = torch.load(at / f"{file}.pt", weights_only=True)
            assert content["param"].shape == parameter.shape
            assert torch.equal(content["param"], before[name])
        assert float(torch.load(at / "step.pt", weights_only=True)) == STEP
        assert {p.name for p in at.iterdir()} == {"fp32.pt", "exp_avg.pt", "exp_avg_sq.pt", "step.pt"}
    for states in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        counters = torch.load(folder / states, weights_only=True)
        assert (counters["global_steps"], counters["dp_world_size"], counters["mp_world_size"]) == (
            STEP,
            1,
            1,
        )
    common = torch.load(folder / "zero" / "optimizer_state.pt", weights_only=True)
    assert float(common["optimizer_state_dict"]["state"][0]["step"]) == STEP
    assert not any(common["param_groups"])  # a run's own config says how to go on
    assert common["ds_version"]


@pytest.mark.parametrize("stage", [2, 3])
def test_what_ds_to_universal_leaves_is_read(tmp_path: Path, stage: int) -> None:
    """Stage 1 and 2 give {"param": …} and a step each; stage 3 flat tensors and one step for all."""
    folder = tmp_path / "global_step12_universal"
    before = state_of_a_run()
    shapes = OrderedDict()
    for bare, parameter in Classify(RAW, seed=0).named_parameters():
        at = folder / "zero" / bare
        at.mkdir(parents=True)
        shapes[bare] = parameter.shape
        for file, name in (
            ("fp32", "model.{}"),
            ("exp_avg", "optim.{}.exp_avg"),
            ("exp_avg_sq", "optim.{}.exp_avg_sq"),
        ):
            tensor = before[name.format(bare)].detach().clone()
            torch.save({"param": tensor, "cat_dim": 0} if stage == 2 else tensor.flatten(), at / f"{file}.pt")
        if stage == 2:
            torch.save(torch.tensor(float(STEP)), at / "step.pt")
    state = {"optimizer_state_dict": {"state": {0: {"step": torch.tensor(float(STEP))}}}}
    torch.save(state, folder / "zero" / "optimizer_state.pt")
    states = {
        "module": {},
        "param_shapes": [shapes],
        "global_steps": STEP,
        "global_samples": 768,
        "skipped_steps": 0,
    }
    name = "mp_rank_00_model_states.pt" if stage == 2 else "zero_pp_rank_0_mp_rank_00_model_states.pt"
    torch.save(states | {"sparse_tensor_module_names": set(), "ds_config": {"a": 1}}, folder / name)
    (tmp_path / "latest_universal").write_text(folder.name)
    with pytest.raises(ConfigError, match="add --model NAME"):
        convert(tmp_path, tmp_path / "out")
    assert convert(tmp_path, tmp_path / "out", model=MODEL).made == ["ema"]
    tensors, back = canonical(tmp_path / "out")
    for name, tensor in tensors.items():
        expected = before[name.replace("ema.", "model.", 1)]
        assert torch.equal(tensor, expected), name
    assert (back.step, back.samples) == (STEP, 768)
    (folder / "zero" / bare / "exp_avg.pt").unlink()
    with pytest.raises(ConfigError, match=r"exp_avg\.pt is missing"):
        convert(tmp_path, tmp_path / "other", model=MODEL)


def test_a_run_starts_from_official_weights(tmp_path: Path) -> None:
    """By way of a checkpoint at step 0; its first step is the first one of the weights that were given."""
    images = make_set(tmp_path / "images", count=64, num_classes=CLASSES)
    torch.save({"model": export_official(RAW)}, tmp_path / "official.pth")
    start = tmp_path / "start"
    convert(tmp_path / "official.pth", start, model=MODEL)
    assert command.main(["verify", str(start)]) == 0
    few = [
        "run.max_steps=1",
        "data.global_batch=4",
        "eval.split=train",
        "optim.lr=1e-12",
        "optim.weight_decay=0",
    ]
    resume = [f"run.resume={start}", "run.allow_changes=true"]
    assert train(words(images, tmp_path / "run", *few, *resume)) == "paused"
    found = canonical(store.list_checkpoints(tmp_path / "run" / "checkpoints")[-1])
    trained = {n.removeprefix("model.backbone."): t for n, t in found[0].items() if n.startswith("model.")}
    assert found[1].step == 1
    for name, tensor in weights(RAW).items():
        assert torch.allclose(trained[name], tensor, atol=1e-9), name


# What must not happen


def test_nothing_is_overwritten_unless_asked(run: Path, tmp_path: Path) -> None:
    for target in (tmp_path / "w.safetensors", tmp_path / "w.pth", tmp_path / "folder"):
        if target.suffix:
            target.write_text("mine")
        else:
            target.mkdir()
            (target / "mine").write_text("mine")
        with pytest.raises(ConfigError, match="is there already; add --overwrite"):
            convert(run, target)
        convert(run, target, overwrite=True)
        convert(target, tmp_path / "check.safetensors", overwrite=True)
        assert load_file(tmp_path / "check.safetensors").keys() == weights(RAW).keys()
        assert not (target / "mine").exists()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"w.safetensors", "w.pth", "folder", "check.safetensors"}


def test_a_damaged_checkpoint_is_not_converted(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    convert(run, copy)
    file = copy / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: sha256 differs"):
        convert(copy, tmp_path / "w.safetensors")
    assert not (tmp_path / "w.safetensors").exists()


def test_what_fails_leaves_nothing_behind(run: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ConfigError, match="could not be written"):
        convert(run, blocked / "w.safetensors")
    file = tmp_path / "raw.safetensors"
    convert(run, file, weights="raw")
    with pytest.raises(ConfigError, match="--weights ema: there are none; it has raw"):
        convert(file, tmp_path / "w.pth", weights="ema")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "raw.safetensors"}


@pytest.mark.parametrize(
    ("source", "target", "options", "words"),
    [
        ("none", "w.pth", {}, "none is not there"),
        ("w.bin", "out", {}, "of no known format; files end in .safetensors"),
        ("run", "out", {"weights": "raw"}, "a canonical checkpoint holds all weights"),
        ("run", "w.pth", {"model": "vmamba_femto"}, "says it is vmamba_atto; leave it out"),
        ("empty", "w.pth", {}, "neither a checkpoint nor a run directory"),
    ],
)
def test_errors_name_what_to_do(
    run: Path, tmp_path: Path, source: str, target: str, options: dict[str, str], words: str
) -> None:
    (tmp_path / "w.bin").write_text("")
    (tmp_path / "empty").mkdir()
    given = run if source == "run" else tmp_path / source
    with pytest.raises((ConfigError, CheckpointError), match=words):
        convert(given, tmp_path / target, **options)  # type: ignore[arg-type]


def test_the_command_says_what_it_did(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), str(tmp_path / "w.safetensors")]) == 0
    told = capsys.readouterr().out
    assert f"{MODEL}, step {STEP}, ema weights" in told
    assert "left out: raw, moments" in told
    assert main([str(tmp_path / "w.safetensors"), str(tmp_path / "x"), "--format", "universal"]) == 0
    assert (
        "made new: an average that equals the weights, an optimizer's moments of zero"
        in capsys.readouterr().out
    )
    with pytest.raises(ConfigError, match="did you mean vmamba_atto"):
        main([str(run), str(tmp_path / "y"), "--model", "vmamba_ato"])
