"""What is shipped is the paper's recipe, for every model; evaluation sees the pixels of torchvision's reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.models import Swin_T_Weights

from distributed.micro import train, words
from shardsets import make_set
from vmamba_dist.checkpoint import store
from vmamba_dist.checkpoint.convert import convert
from vmamba_dist.config import load, to_dict
from vmamba_dist.config.schema import AugmentConfig, Config, EvalConfig
from vmamba_dist.data.augment import EvalTransform, Normalize
from vmamba_dist.data.shards import pack, read_index
from vmamba_dist.data.stream import eval_batches
from vmamba_dist.models import create_model, export_official, list_models, load_official
from vmamba_dist.models.variants import get_variant
from vmamba_dist.optim.schedule import build_schedule

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PRETRAIN = sorted((CONFIGS / "pretrain").glob("*.yaml"))
FINETUNE = sorted((CONFIGS / "finetune").glob("*.yaml"))
PUBLISHED = [
    name for name in list_models() if "vanilla" in name or name.split("_")[1] in ("tiny", "small", "base")
]
CPU = torch.device("cpu")


def test_every_model_has_its_recipe() -> None:
    assert {path.stem for path in PRETRAIN} == set(list_models())


@pytest.mark.parametrize("file", [*PRETRAIN, *FINETUNE], ids=lambda path: path.stem)
def test_a_shipped_config_builds_its_model(file: Path) -> None:
    cfg = load([f"config={file}"])
    with torch.device("meta"):
        model = create_model(cfg.model.name, num_classes=1000, drop_path_rate=cfg.model.drop_path)
    assert next(model.parameters()).is_meta
    assert file.stem.startswith(cfg.model.name)
    assert cfg.run.dir == f"runs/{file.stem}"
    assert cfg.launch.name == file.stem
    assert cfg.data.image_size % 32 == 0
    steps_per_epoch = 1281167 // cfg.data.global_batch
    assert cfg.checkpoint.every_steps == steps_per_epoch


@pytest.mark.parametrize("file", PRETRAIN, ids=lambda path: path.stem)
def test_a_pretraining_config_is_the_papers_recipe(file: Path) -> None:
    cfg = load([f"config={file}"])
    expected = {
        "data": {"image_size": 224, "global_batch": 1024, "decoder": "pil"},
        "optim": {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.05, "clip": 5.0},
        "schedule": {"epochs": 300},
        "ema": {"enabled": True, "decay": 0.9999, "warmup": True},
        "objective": {"name": "classify", "label_smoothing": 0.1},
        "precision": {"compute": "bfloat16"},
        "eval": {"crop": 0.875},
        "augment": {
            "crop": True,
            "crop_scale": (0.08, 1.0),
            "hflip": 0.5,
            "interpolation": "bicubic",
            "randaugment_ops": 2,
            "randaugment_magnitude": 9.0,
            "randaugment_std": 0.5,
            "erasing": 0.25,
            "mixup": 0.8,
            "cutmix": 1.0,
            "switch": 0.5,
            "mix_prob": 1.0,
            "color_jitter": 0.0,
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
        },
    }
    for group, fields in expected.items():
        for name, value in fields.items():
            assert getattr(getattr(cfg, group), name) == value, f"{group}.{name}"
    assert rates(cfg) == pytest.approx((1e-6, 1e-3, 1e-5), rel=1e-3)  # per 1024 images
    assert cfg.schedule.warmup * cfg.schedule.epochs == pytest.approx(20)
    published = file.stem in PUBLISHED
    assert cfg.optim.decay == ("official" if published else "ssm_exempt")
    assert ("UNTUNED" in file.read_text()) == (not published)
    assert cfg.model.drop_path is None  # the variant's own


def rates(cfg: Config) -> tuple[float, float, float]:
    """First, highest and last learning rate."""
    total = cfg.schedule.epochs * 1251 * cfg.data.global_batch
    lr = build_schedule(cfg.schedule, cfg.optim, global_batch=cfg.data.global_batch, total_samples=total)
    return lr(0), max(lr(int(total * share)) for share in np.linspace(0, 1, 3001)), lr(total)


def test_published_drop_path_rates() -> None:
    rates = {name: get_variant(name).drop_path_rate for name in PUBLISHED}
    assert rates == {
        "vmamba_tiny_s1l8": 0.2,
        "vmamba_tiny_s2l5": 0.2,
        "vmamba_small_s1l20": 0.3,
        "vmamba_small_s2l15": 0.3,
        "vmamba_base_s1l20": 0.5,
        "vmamba_base_s2l15": 0.6,
        "vanilla_vmamba_tiny": 0.2,
        "vanilla_vmamba_small": 0.3,
        "vanilla_vmamba_base": 0.6,
    }


# Fine-tuning at another resolution


def test_weights_load_at_another_resolution() -> None:
    """No parameter's shape knows the image's: official weights fit, and the model goes on from 224 to 384 px."""
    torch.manual_seed(0)
    trained = create_model("vmamba_atto", num_classes=7).eval()
    model = create_model("vmamba_atto", num_classes=7).eval()
    load_official(model, export_official(trained))
    with torch.inference_mode():
        for size in (224, 384, 96):
            images = torch.randn(1, 3, size, size)
            assert torch.equal(model(images), trained(images))


def test_a_fine_tune_starts_from_weights_of_another_resolution(tmp_path: Path) -> None:
    """The shipped config, made small: 32 px weights of a run, by way of safetensors, then steps at 64 px."""
    images = make_set(tmp_path / "images", count=64, num_classes=7)
    few = ["data.global_batch=4", "eval.split=train", "run.max_steps=1"]
    assert train(words(images, tmp_path / "first", *few, "data.image_size=32")) == "paused"
    convert(tmp_path / "first", tmp_path / "weights.safetensors")
    convert(tmp_path / "weights.safetensors", tmp_path / "start")
    (config,) = FINETUNE
    recipe = to_dict(load([f"config={config}"]))
    kept = [
        f"{group}.{key}={recipe[group][key]}" for group, key in (("optim", "lr"), ("optim", "weight_decay"))
    ]
    kept += [f"schedule.warmup={recipe['schedule']['warmup']}", f"eval.crop={recipe['eval']['crop']}"]
    start = [f"run.resume={tmp_path / 'start'}", "run.allow_changes=true"]
    assert train(words(images, tmp_path / "second", *few, "data.image_size=64", *start, *kept)) == "paused"
    saved = store.list_checkpoints(tmp_path / "second" / "checkpoints")
    assert [path.name for path in saved] == ["step-000000001"]


# Evaluation


def test_evaluation_sees_the_pixels_of_torchvisions_reference(tmp_path: Path) -> None:
    """From JPEG to normalised input: uint8 pixels are the same, floats differ by 5e-7 at most."""
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    sizes = [(500, 375), (375, 500), (256, 256), (257, 300), (640, 427), (180, 200), (224, 1000)]
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "b").mkdir()
    files = []
    for i, size in enumerate(sizes):
        image = photos[i % 2].resize(size, Image.Resampling.LANCZOS)
        files.append(tmp_path / "images" / "ab"[i % 2] / f"{i}.jpg")
        (image.convert("L") if i == 2 else image).save(files[-1], quality=92)
    pack(tmp_path / "images", tmp_path / "set", shuffle=False)
    reference = Swin_T_Weights.IMAGENET1K_V1.transforms(resize_size=256)
    assert reference.crop_size == [224]
    (batch,) = eval_batches(read_index(tmp_path / "set"), EvalConfig(batch=len(sizes)), 224)
    normalised = Normalize(AugmentConfig())(batch.images, CPU)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (reference.mean, reference.std))
    by_key = {path.stem: path for path in files}
    for row, key in enumerate(batch.keys):
        image = Image.open(by_key[key.rpartition("_")[2]]).convert("RGB")
        expected = reference(image)
        pixels = ((expected * std + mean) * 255).round().to(torch.uint8)
        assert torch.equal(batch.images[row], pixels)
        assert torch.equal(EvalTransform(224, 0.875)(image), pixels)
        assert (normalised[row] - expected).abs().max() <= 5e-7
