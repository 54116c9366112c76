"""Every draw is a function of (seed, epoch, position) or (seed, step), and targets say what the pixels show."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data.mixup import mixup_target
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from shardsets import picture
from vmamba_dist.config.schema import AugmentConfig
from vmamba_dist.data.augment import (
    RESAMPLE,
    DeviceTransform,
    EvalTransform,
    Normalize,
    TrainTransform,
    draw_mix,
    operate,
)
from vmamba_dist.data.batch import Batch
from vmamba_dist.data.draws import RANDAUGMENT, Drawing, randaugment, sample_seeds

CPU = torch.device("cpu")
PLAIN = AugmentConfig(erasing=0, mixup=0, cutmix=0)


def batch_of(images: torch.Tensor, first: int = 0, step: int = 0, epoch: int = 0) -> Batch:
    count = len(images)
    return Batch(
        images,
        torch.arange(count) % 7,
        torch.arange(first, first + count),
        [""] * count,
        step=step,
        epoch=epoch,
    )


def noise(count: int, size: int = 12) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )


@pytest.mark.parametrize(
    "config",
    [
        AugmentConfig(),
        AugmentConfig(crop=False, hflip=0, randaugment_ops=0, rotate_deg=10, shift=0.06, zoom=0.1),
        AugmentConfig(color_jitter=0.4, randaugment_ops=0, interpolation="bilinear"),
    ],
    ids=["recipe", "digits", "jitter"],
)
def test_a_sample_is_a_function_of_its_seed_and_the_callers_state_is_untouched(config: AugmentConfig) -> None:
    transform = TrainTransform(config, 20)
    before = torch.get_rng_state()

    def make(position: int) -> torch.Tensor:
        return transform(picture(5), sample_seeds(1, 2, [position])[0])

    images = [make(position) for position in range(8)]
    assert all(image.shape == (3, 20, 20) and image.dtype == torch.uint8 for image in images)
    assert all(torch.equal(image, make(position)) for position, image in enumerate(images))
    assert len({image.numpy().tobytes() for image in images}) > 5
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "config",
    [
        AugmentConfig(),
        AugmentConfig(crop_ratio=(3.0, 3.5), hflip=0.3),
        AugmentConfig(crop=False, rotate_deg=10, shift=0.06, zoom=0.1, randaugment_ops=0),
        AugmentConfig(color_jitter=0.4, randaugment_ops=0, interpolation="bilinear"),
    ],
    ids=["recipe", "no crop fits", "digits", "jitter"],
)
def test_draws_and_pixels_are_those_of_torchvisions_transforms(config: AugmentConfig) -> None:
    """Without RandAugment, whose ranges are timm's: the same generator, seeded alike, and the same bytes."""
    config = dataclasses.replace(config, randaugment_ops=0)
    size, how = 20, InterpolationMode(config.interpolation)
    steps: list[Callable[[Image.Image], Image.Image]] = [
        v2.RandomResizedCrop([size, size], config.crop_scale, config.crop_ratio, interpolation=how)
        if config.crop
        else v2.Resize([size, size], interpolation=how),
        v2.RandomHorizontalFlip(config.hflip),
    ]
    if config.rotate_deg:
        shift, zoom = (config.shift, config.shift), (1 - config.zoom, 1 + config.zoom)
        steps.append(v2.RandomAffine(config.rotate_deg, translate=shift, scale=zoom, interpolation=how))
    if config.color_jitter:
        steps.append(v2.ColorJitter(*[config.color_jitter] * 3))
    ours = TrainTransform(config, size)
    for seed in range(40):
        image = picture(seed)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            theirs = image
            for step in steps:
                theirs = step(theirs)
        assert np.array_equal(ours(image, seed).permute(1, 2, 0).numpy(), np.asarray(theirs))


def test_randaugment_draws_what_the_recipe_says() -> None:
    draw = Drawing(AugmentConfig(crop=False, hflip=0, randaugment_std=0), 32)
    drawn = [draw(40, 40, seed).operations for seed in range(3000)]
    assert np.mean([len(operations) for operations in drawn]) == pytest.approx(1.0, abs=0.05)
    names = Counter(operation.name for operations in drawn for operation in operations)
    assert names["warp"] / names.total() == pytest.approx(5 / 15, abs=0.04)
    assert names["invert"] / names.total() == pytest.approx(1 / 15, abs=0.02)
    factors = {o.argument[0] for operations in drawn for o in operations if o.name == "color"}
    assert sorted(factors) == pytest.approx([1 - 0.81, 1 + 0.81])


def test_sample_seeds_differ() -> None:
    seeds = {made for s in range(3) for e in range(3) for made in sample_seeds(s, e, range(200))}
    assert len(seeds) == 1800
    assert sample_seeds(1, 2, range(9))[5:7] == sample_seeds(1, 2, [5, 6])
    assert all(0 <= made < 2**32 for made in seeds)


def changed(image: Image.Image, name: str, level: float, sign: float, how: str = "bicubic") -> Image.Image:
    return operate(image, randaugment(name, level, sign, image.width, (0.0, 0.0, 0.0)), RESAMPLE[how])


@pytest.mark.parametrize("name", RANDAUGMENT)
@pytest.mark.parametrize("level", [0.0, 0.9, 1.0])
def test_randaugment_operations_keep_size_and_mode(name: str, level: float) -> None:
    image = picture(3).resize((19, 19))
    for sign in (-1.0, 1.0):
        out = changed(image, name, level, sign)
        assert (out.size, out.mode) == (image.size, "RGB")
    if name not in ("autocontrast", "equalize", "invert"):  # these know no level
        same = np.array_equal(np.asarray(changed(image, name, 0.0, 1.0)), np.asarray(image))
        assert same or name == "posterize"
        assert not np.array_equal(np.asarray(out), np.asarray(image)) or level == 0


@pytest.mark.parametrize("level", [0.3, 0.9])
def test_geometric_operations_are_torchvisions(level: float) -> None:
    image = picture(3).resize((19, 19))
    fill, bicubic = [0.0, 0.0, 0.0], InterpolationMode.BICUBIC
    angle, shear, shift = 30.0 * level, math.degrees(math.atan(0.3 * level)), int(0.45 * level * 19)
    expected = {"rotate": F.rotate(image, angle, interpolation=bicubic, fill=fill)}
    for name, sheared, moved in (
        ("shear_x", [shear, 0.0], [0, 0]),
        ("shear_y", [0.0, shear], [0, 0]),
        ("translate_x", [0.0, 0.0], [shift, 0]),
        ("translate_y", [0.0, 0.0], [0, shift]),
    ):
        expected[name] = F.affine(image, 0.0, moved, 1.0, sheared, bicubic, fill, center=[0.0, 0.0])
    for name, theirs in expected.items():
        assert np.array_equal(np.asarray(changed(image, name, level, 1.0)), np.asarray(theirs)), name


def test_geometric_operations_move_the_picture_as_said() -> None:
    dot = np.zeros((21, 21, 3), np.uint8)
    dot[10, 10] = 255

    def where(name: str, level: float, sign: float) -> tuple[int, int]:
        out = np.asarray(changed(Image.fromarray(dot), name, level, sign, "nearest"))[:, :, 0]
        y, x = np.argwhere(out > 0).mean(0)
        return round(y), round(x)

    assert where("translate_x", 0.9, 1.0) == (10, 18)
    assert where("translate_x", 0.9, -1.0) == (10, 2)
    assert where("translate_y", 0.9, 1.0) == (18, 10)
    assert abs(where("shear_x", 1.0, 1.0)[1] - 10) == 3
    assert abs(where("shear_y", 1.0, 1.0)[0] - 10) == 3


def test_evaluation_takes_the_centre_or_the_whole() -> None:
    wide = np.zeros((40, 80, 3), np.uint8)
    wide[:, 40:] = 255
    whole = EvalTransform(16, 1.0)(Image.fromarray(wide))
    assert whole.shape == (3, 16, 16)
    assert whole[0, :, :6].max() == 0
    assert whole[0, :, 10:].min() == 255
    wide[:, :20] = 100
    wide[:, 60:] = 100
    centre = EvalTransform(16, 1.0 - 1e-9)(Image.fromarray(wide))
    assert not (centre[0, :, 2:-2] == 100).any()
    cropped = EvalTransform(14, 0.875)(Image.fromarray(wide[:, 20:60]))
    assert cropped.shape == (3, 14, 14)


def test_normalisation_is_the_arithmetic() -> None:
    images = noise(4)
    out = Normalize(PLAIN)(images, CPU)
    mean, std = torch.tensor(PLAIN.mean).view(3, 1, 1), torch.tensor(PLAIN.std).view(3, 1, 1)
    assert torch.allclose(out, (images / 255 - mean) / std, atol=1e-5)
    assert out.dtype == torch.float32


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_targets_are_smoothed_as_timm_does(smoothing: float) -> None:
    batch = batch_of(noise(6))
    _, targets = DeviceTransform(PLAIN, 7, smoothing, 0)(batch, CPU)
    assert torch.allclose(targets, mixup_target(batch.labels, 7, 1.0, smoothing), atol=1e-7)


@given(st.integers(0, 10**6), st.sampled_from([(0.8, 1.0), (0.8, 0.0), (0.0, 1.0)]), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_mixing_is_within_pairs_and_targets_follow_the_pixels(
    step: int, alphas: tuple[float, float], quarter: int
) -> None:
    size = 4 * quarter
    config = AugmentConfig(erasing=0, mixup=alphas[0], cutmix=alphas[1])
    images = torch.zeros((6, 3, size, size), dtype=torch.uint8)
    images[0::2] = 255  # of each pair the first is white, the second black
    batch = Batch(
        images, torch.tensor([0, 1] * 3), torch.tensor([0, 1, 6, 7, 12, 13]), [""] * 6, step=step, epoch=0
    )
    out, targets = DeviceTransform(config, 2, 0.0, 9)(batch, CPU)
    white, black = Normalize(config)(images[:2], CPU)
    share_of_white = ((out - black) / (white - black)).mean((1, 2, 3))
    assert torch.allclose(share_of_white, targets[:, 0], atol=1e-5)
    assert torch.allclose(targets.sum(1), torch.ones(6), atol=1e-6)
    assert torch.equal(targets[0], targets[2])  # one λ for the update
    assert torch.allclose(targets[0], targets[1].flip(0), atol=1e-6)


def test_mix_parameters_depend_on_the_step_alone_and_have_the_right_law() -> None:
    config = AugmentConfig(mix_prob=0.75, switch=0.25)
    drawn = [draw_mix(config, 3, step, 16) for step in range(4000)]
    assert drawn == [draw_mix(config, 3, step, 16) for step in range(4000)]
    assert drawn[:50] != [draw_mix(config, 4, step, 16) for step in range(50)]
    mixed = [mix for mix in drawn if mix is not None]
    assert len(mixed) / 4000 == pytest.approx(0.75, abs=0.03)
    assert sum(mix.box is not None for mix in mixed) / len(mixed) == pytest.approx(0.25, abs=0.03)
    lam = [mix.lam for mix in mixed if mix.box is None]
    assert np.mean(lam) == pytest.approx(0.5, abs=0.03)
    assert np.var(lam) == pytest.approx(1 / (4 * (2 * 0.8 + 1)), abs=0.01)  # Beta(.8, .8)
    for mix in mixed:
        if mix.box is not None:
            top, bottom, left, right = mix.box
            assert 0 <= top <= bottom <= 16
            assert 0 <= left <= right <= 16
            assert mix.lam == 1 - (bottom - top) * (right - left) / 256


def test_a_parted_pair_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="parted"):
        DeviceTransform(AugmentConfig(), 7, 0.1, 0)(batch_of(noise(4), first=1), CPU)


def test_erasing_depends_on_the_position_and_not_on_the_batch() -> None:
    config = AugmentConfig(erasing=0.5, mixup=0, cutmix=0)
    transform = DeviceTransform(config, 7, 0.0, 5)
    images = noise(32, 24)
    whole, _ = transform(batch_of(images), CPU)
    plain = Normalize(config)(images, CPU)
    erased = (whole != plain).flatten(1).any(1)
    assert 8 <= int(erased.sum()) <= 24
    for first, end in ((0, 6), (6, 8), (8, 32)):
        part, _ = transform(batch_of(images[first:end], first=first), CPU)
        assert torch.equal(part, whole[first:end])
    other, _ = transform(batch_of(images, epoch=1), CPU)
    assert not torch.equal(other, whole)


def test_erased_boxes_and_noise_have_the_right_law() -> None:
    config = AugmentConfig(erasing=1.0, mixup=0, cutmix=0, mean=(0, 0, 0), std=(1, 1, 1))
    size, count = 24, 400
    out, _ = DeviceTransform(config, 7, 0.0, 0)(
        batch_of(torch.zeros((count, 3, size, size), dtype=torch.uint8)), CPU
    )
    erased = out != 0
    assert (erased.flatten(1).any(1)).all()
    shares = []
    for image in erased:
        assert torch.equal(image[0], image[1])
        ys, xs = image[0].nonzero().unbind(1)
        height, width = int(ys.max() - ys.min()) + 1, int(xs.max() - xs.min()) + 1
        assert int(image[0].sum()) == height * width
        assert height < size
        assert width < size
        shares.append(height * width / size**2)
    assert min(shares) > 0.012
    assert max(shares) < 0.36
    values = out[erased]
    assert float(values.mean()) == pytest.approx(0, abs=0.02)
    assert float(values.std()) == pytest.approx(1, abs=0.02)
    assert float((values.abs() < 1).float().mean()) == pytest.approx(math.erf(1 / math.sqrt(2)), abs=0.01)


def test_the_recipe_runs_on_an_odd_batch_of_pairs() -> None:
    images, targets = DeviceTransform(AugmentConfig(), 7, 0.1, 0)(
        batch_of(noise(6, 20), first=14, step=3), CPU
    )
    assert images.shape == (6, 3, 20, 20)
    assert torch.isfinite(images).all()
    assert torch.allclose(targets.sum(1), torch.ones(6), atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_part_is_the_same_on_a_gpu() -> None:
    transform = DeviceTransform(AugmentConfig(erasing=0.5), 7, 0.1, 0)
    here, targets = transform(batch_of(noise(32, 24)), CPU)
    there, targets_there = transform(batch_of(noise(32, 24)), torch.device("cuda"))
    assert torch.allclose(here, there.cpu(), atol=1e-5)
    assert torch.allclose(targets, targets_there.cpu(), atol=1e-7)
