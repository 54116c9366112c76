"""Whatever the decoder, an image comes out as the documented RGB, cropped, flipped and changed alike."""

from __future__ import annotations

import dataclasses
import io
import logging
import struct
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from distributed.micro import metrics, train, words
from shardsets import make_set, members, overwrite
from vmamba_dist.config import load as load_config
from vmamba_dist.config.schema import AugmentConfig, ConfigError, DataConfig
from vmamba_dist.data import ondevice
from vmamba_dist.data.ahead import Ahead
from vmamba_dist.data.augment import RESAMPLE, DeviceTransform, TrainTransform, operate, to_tensor
from vmamba_dist.data.batch import Batch, Encoded
from vmamba_dist.data.decode import DecodeError, decode, look, orientation
from vmamba_dist.data.draws import Operation, randaugment
from vmamba_dist.data.ondevice import DeviceDecoder
from vmamba_dist.data.pixels import operate as operate_batch
from vmamba_dist.data.pixels import resize_crops, shape_upright, upright
from vmamba_dist.data.prepare import Decoder, TrainPreparation, decode_by_torchvision
from vmamba_dist.data.reader import Rows
from vmamba_dist.data.shards import Index, pack, read_index
from vmamba_dist.data.stream import TrainStream

CPU = torch.device("cpu")
PLAIN = AugmentConfig(crop=False, hflip=0, randaugment_ops=0)  # the whole image, only resized
DECODERS: tuple[Decoder, ...] = ("pil", "torchvision", "gpu")
EXIF_TURNS = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: x.transpose(1, 0, 2)[:, ::-1],
    7: lambda x: x.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda x: x.transpose(1, 0, 2)[::-1],
}
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = [CPU, pytest.param(torch.device("cuda"), marks=gpu)]


def photo(width: int = 120, height: int = 90, which: int = 0) -> Image.Image:
    return Image.fromarray(load_sample_images().images[which]).resize(
        (width, height), Image.Resampling.BICUBIC
    )


def encoded(image: Image.Image, form: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def jpeg_with_orientation(image: Image.Image, value: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return encoded(image, quality=95, exif=exif)


def prepared(
    decoder: Decoder, data: bytes, size: int, augment: AugmentConfig = PLAIN, seed: int = 0
) -> torch.Tensor:
    """What a decoder makes of one image; what is left to the device is decoded on the CPU."""
    made = TrainPreparation(augment, size, decoder)(data, seed)
    if isinstance(made, torch.Tensor):
        return made
    batch = Batch(
        torch.zeros((1, 3, size, size), dtype=torch.uint8),
        torch.tensor([0]),
        torch.tensor([0]),
        [""],
        step=0,
        epoch=0,
        encoded={0: made},
    )
    return DeviceDecoder(size, augment.interpolation, CPU, never)(batch).images[0]


def never(epoch: int, position: int) -> tuple[torch.Tensor, Rows]:
    raise AssertionError(f"position {position} of epoch {epoch} was read again")


def difference(a: torch.Tensor, b: torch.Tensor) -> int:
    return int((a.int() - b.int()).abs().max())


def tones() -> np.ndarray:
    """A picture in which each rule shows: 24 × 16, smooth, no two quarters alike."""
    y, x = np.mgrid[0:16, 0:24]
    return np.stack([x * 10, y * 15, (x + y) * 6], axis=2).astype(np.uint8)


def deep_png(pixels: np.ndarray) -> bytes:
    """A PNG of 16-bit colour, (H, W, 3) uint16, which Pillow reads and does not write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    height, width, _ = pixels.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    ends = chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + ends


def kinds() -> dict[str, tuple[bytes, np.ndarray]]:
    """Name → (file, the RGB that the rule promises), for what is not plain colour."""
    rgb = tones()
    grey = rgb[:, :, 0]
    wide = grey.astype(np.uint16) * 257 + 100
    alpha = np.full_like(grey, 64)
    alpha[:, 12:] = 255
    over_white = (
        (rgb.astype(int) * alpha[..., None] + 255 * (255 - alpha[..., None].astype(int))) / 255
    ).round()
    palette = Image.fromarray(rgb).quantize(16)
    keyed = palette.copy()
    clear = keyed.getpixel((0, 0))
    keyed_rgb = np.array(palette.convert("RGB"))
    keyed_rgb[np.asarray(palette) == clear] = 255
    clear_corner = rgb.copy()
    clear_corner[(rgb == 0).all(2)] = 255
    repeated = np.repeat(grey[:, :, None], 3, 2)
    la = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])
    la_over = ((grey.astype(int) * alpha + 255 * (255 - alpha.astype(int))) / 255).round()
    return {
        "16-bit grey": (encoded(Image.fromarray(wide), "PNG"), repeated),
        "16-bit colour": (deep_png(rgb.astype(np.uint16) * 256 + 200), rgb),
        "grey": (encoded(Image.fromarray(grey), "PNG"), repeated),
        "grey jpeg": (
            jpeg := encoded(Image.fromarray(grey), quality=95),
            np.repeat(np.asarray(Image.open(io.BytesIO(jpeg)))[:, :, None], 3, 2),
        ),
        "palette": (encoded(palette, "PNG"), np.asarray(palette.convert("RGB"))),
        "palette with a clear colour": (encoded(keyed, "PNG", transparency=clear), keyed_rgb),
        "a clear colour": (encoded(Image.fromarray(rgb), "PNG", transparency=(0, 0, 0)), clear_corner),
        "alpha": (encoded(Image.fromarray(np.dstack([rgb, alpha])), "PNG"), over_white),
        "grey with alpha": (encoded(la, "PNG"), np.repeat(la_over[:, :, None], 3, 2)),
        "alpha webp": (
            encoded(Image.fromarray(np.dstack([rgb, alpha])), "WEBP", lossless=True, exact=True),
            over_white,
        ),
        "one bit": (
            encoded(Image.fromarray(grey > 100), "PNG"),
            np.repeat((grey > 100)[:, :, None] * 255, 3, 2),
        ),
    }


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("kind", kinds())
def test_every_kind_comes_out_as_the_documented_rgb(kind: str, decoder: Decoder) -> None:
    """Resized from 24 × 16 to 48 × 48 by nearest: every pixel stands for itself."""
    data, expected = kinds()[kind]
    made = prepared(decoder, data, 48, dataclasses.replace(PLAIN, interpolation="nearest"))
    shown = made.permute(1, 2, 0).numpy()[1::3, ::2].astype(int)
    assert shown.shape == (16, 24, 3)
    assert np.abs(shown - expected).max() <= 1  # alpha is blended in whole numbers


@pytest.mark.parametrize("decoder", DECODERS)
def test_cmyk_is_converted_without_profiles(decoder: Decoder) -> None:
    inks = np.zeros((16, 16, 4), np.uint8)
    inks[:8, :, 0] = 200  # cyan takes red away
    inks[8:, :, 3] = 100  # black takes a share of all
    shown = prepared(decoder, encoded(Image.fromarray(inks, "CMYK"), quality=100), 16)
    assert (shown[:, 4, 4].int() - torch.tensor([55, 255, 255])).abs().max() <= 4
    assert (shown[:, 12, 4].int() - 155).abs().max() <= 4


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("value", EXIF_TURNS)
def test_exif_orientation_is_applied(value: int, decoder: Decoder) -> None:
    """The eight turns of one picture, stored so that each is upright again, agree; crops are drawn upright too."""
    scene = np.asarray(photo(96, 64))
    back = {6: 8, 8: 6}.get(value, value)
    stored = jpeg_with_orientation(Image.fromarray(np.ascontiguousarray(EXIF_TURNS[back](scene))), value)
    assert orientation(look(stored)) == value
    assert np.array_equal(
        decode(stored), EXIF_TURNS[value](np.asarray(decode_by_torchvision(stored).permute(1, 2, 0)))
    )
    for augment in (PLAIN, AugmentConfig(randaugment_ops=0, hflip=0)):
        made = prepared(decoder, stored, 32, augment, seed=7)
        plain = prepared("pil", encoded(Image.fromarray(scene), quality=95), 32, augment, seed=7)
        assert (made.float() - plain.float()).abs().mean() < 3  # another JPEG of the same scene


@pytest.mark.parametrize("decoder", DECODERS)
def test_an_orientation_in_xmp_counts_too(decoder: Decoder) -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    stored = encoded(photo(96, 64), quality=95, xmp=xmp)
    assert orientation(look(stored)) == 6
    expected = prepared("pil", jpeg_with_orientation(photo(96, 64), 6), 40)
    assert difference(prepared(decoder, stored, 40), expected) <= (0 if decoder != "torchvision" else 2)


def test_upright_is_the_definition() -> None:
    scene = np.asarray(photo(9, 7))
    for value, turn in EXIF_TURNS.items():
        made = upright(to_tensor(Image.fromarray(scene)), value).permute(1, 2, 0).numpy()
        assert np.array_equal(made, turn(scene))
        assert made.shape[1::-1] == shape_upright(9, 7, value)


@pytest.mark.parametrize("subsampling", [0, 1, 2], ids=["444", "422", "420"])
@pytest.mark.parametrize("progressive", [False, True], ids=["baseline", "progressive"])
def test_torchvision_decodes_to_pillows_pixels(subsampling: int, progressive: bool) -> None:
    """To within a level, should the two bring different versions of libjpeg; they were equal when tried."""
    data = encoded(photo(121, 91), quality=88, subsampling=subsampling, progressive=progressive)
    assert difference(decode_by_torchvision(data), to_tensor(decode(data))) <= 1


def test_torchvisions_resizing_differs_in_few_pixels_and_little() -> None:
    augment = AugmentConfig(randaugment_ops=0)
    data = encoded(photo(200, 150), quality=90)
    unequal = 0.0
    for seed in range(20):
        pillow, torchvision = (prepared(d, data, 112, augment, seed) for d in ("pil", "torchvision"))
        assert difference(pillow, torchvision) <= 2
        unequal += (pillow != torchvision).float().mean().item() / 20
    assert unequal < 0.02


@pytest.mark.parametrize("turn", [1, 2, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_a_scaled_decode_shows_the_same_crop(factor: int, turn: int) -> None:
    """Of sizes that the factor does not divide; a shift by a small pixel would differ much more."""
    augment = AugmentConfig(randaugment_ops=0, crop_scale=(0.9, 1.0), crop_ratio=(0.9, 1.2))
    data = jpeg_with_orientation(photo(48 * factor + 37, 48 * factor + 11), turn)
    for seed in range(5):
        pillow, scaled = (prepared(d, data, 40, augment, seed).float() for d in ("pil", "torchvision"))
        assert not torch.equal(pillow, scaled)
        assert (pillow - scaled).abs().mean() < 3.0
        assert (pillow.roll(1, 2) - scaled)[:, :, 1:].abs().mean() > 8.0


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("cut", [1, 2, 400])
def test_bytes_that_pillow_refuses_are_refused_by_all(decoder: Decoder, cut: int) -> None:
    data = encoded(photo(), quality=90)
    for bad in (data[:-cut], b"\xff\xd8 no image \xff\xd9", b""):
        with pytest.raises(DecodeError):
            prepared(decoder, bad, 32)


def test_what_a_decoder_leaves_to_pillow_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="vmamba_dist")
    make = TrainPreparation(PLAIN, 16, "gpu")
    for _ in range(3):
        assert isinstance(make(encoded(photo(), "PNG"), 0), torch.Tensor)
        assert isinstance(make(encoded(photo()), 0), Encoded)
    assert [record.message for record in caplog.records] == [
        "data.decoder=gpu decodes JPEGs in grey or YCbCr; others, like a PNG in mode RGB, Pillow does"
    ]


# Pixels of a batch


OPERATIONS = [
    Operation("flip"),
    Operation("autocontrast"),
    Operation("equalize"),
    Operation("invert"),
    *(Operation("posterize", (bits,)) for bits in (1, 4, 8)),
    *(Operation("solarize", (threshold,)) for threshold in (0, 26, 256)),
    *(Operation("solarize_add", (add,)) for add in (0, 99)),
    *(
        Operation(name, (f,))
        for name in ("color", "contrast", "brightness", "sharpness")
        for f in (0.1, 0.7, 1.0, 1.9)
    ),
]


def awkward(size: int) -> list[Image.Image]:
    """A photograph, one colour, two tones, noise, and a picture in which one channel is empty."""
    rng = np.random.default_rng(0)
    flat = np.full((size, size, 3), (7, 130, 255), np.uint8)
    tones_ = np.where(np.arange(size)[:, None, None] < size // 2, 40, 41).repeat(size, 1).repeat(3, 2)
    lone = np.asarray(photo(size, size, 1)).copy()
    lone[:, :, 1] = 0
    arrays = (flat, tones_.astype(np.uint8), rng.integers(0, 256, (size, size, 3), dtype=np.uint8), lone)
    return [photo(size, size), *map(Image.fromarray, arrays)]


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: f"{o.name}{o.argument}")
def test_an_operation_on_a_batch_gives_pillows_bytes(operation: Operation, device: torch.device) -> None:
    images = awkward(37)
    batch = torch.stack([to_tensor(image) for image in images]).contiguous().to(device)
    made = operate_batch(batch, [[operation]] * len(images)).cpu()
    for image, out in zip(images, made, strict=True):
        assert torch.equal(out, to_tensor(operate(image, operation, RESAMPLE["bicubic"])))


RECIPES = {
    "recipe": AugmentConfig(),
    "digits": AugmentConfig(crop=False, hflip=0, randaugment_ops=0, rotate_deg=10, shift=0.06, zoom=0.1),
    "bilinear": AugmentConfig(randaugment_ops=4, rotate_deg=5, color_jitter=0.4, interpolation="bilinear"),
    "nearest": AugmentConfig(randaugment_ops=3, rotate_deg=3, interpolation="nearest"),
}


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("augment", RECIPES.values(), ids=RECIPES)
def test_a_batch_of_draws_gives_pillows_bytes(augment: AugmentConfig, device: torch.device) -> None:
    """60 images of 60 sizes, larger and smaller than the square; and each alone gives what the batch gives."""
    size = 40
    transform = TrainTransform(augment, size)
    images = [photo(23 + 5 * i % 200, 31 + 7 * i % 150, i % 2) for i in range(60)]
    draws = [transform.draw(*image.size, seed) for seed, image in enumerate(images)]

    def make(rows: range) -> torch.Tensor:
        tensors = [to_tensor(images[row]).to(device) for row in rows]
        crops = resize_crops(tensors, [draws[row].crop for row in rows], size, augment.interpolation)
        return operate_batch(crops, [draws[row].operations for row in rows], augment.interpolation).cpu()

    together = make(range(60))
    for row, (image, draw) in enumerate(zip(images, draws, strict=True)):
        assert torch.equal(together[row], transform.apply(image, draw)), draw
    assert torch.equal(torch.cat([make(range(1)), make(range(1, 14))]), together[:14])


def test_memory_is_bounded_by_taking_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [to_tensor(photo(90 + i, 80)) for i in range(7)]
    crops = [(0, 0, 80, 90 + i) for i in range(7)]
    together = resize_crops(images, crops, 32)
    monkeypatch.setattr("vmamba_dist.data.pixels._AT_ONCE", 3 * 96 * 96 * 2)
    assert torch.equal(resize_crops(images, crops, 32), together)
    turned = [[randaugment("rotate", 0.1 * (1 + i), 1.0, 32, (9.0, 9.0, 9.0))] for i in range(7)]
    warped = operate_batch(together.clone(), turned)
    monkeypatch.setattr("vmamba_dist.data.pixels._WARPED_AT_ONCE", 3)
    assert torch.equal(operate_batch(together.clone(), turned), warped)


# The stream


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    """JPEG, PNG and WebP by turns."""
    return read_index(make_set(tmp_path_factory.mktemp("decoders"), 97))


def stream(index: Index, decoder: Decoder, workers: int = 0) -> TrainStream:
    data = DataConfig(image_size=16, global_batch=12, workers=workers, block=4, decoder=decoder)
    return TrainStream(index, data, AugmentConfig(), seed=5, lanes=6)


def batches(made: TrainStream, count: int) -> Iterator[Batch]:
    """The first batches, decoded on the CPU where they are left to the device."""
    decoder = DeviceDecoder(16, "bicubic", CPU, made.read_on_host)
    ahead = Ahead(islice(made.batches(), count), decoder, CPU)
    try:
        yield from ahead
    finally:
        ahead.close()
        made.close()


def assert_same(some: Iterable[Batch], others: Iterable[Batch], levels: int = 0) -> None:
    for a, b in zip(some, others, strict=True):
        assert (a.step, a.epoch, a.keys, a.bad, a.encoded) == (b.step, b.epoch, b.keys, b.bad, b.encoded)
        assert torch.equal(a.positions, b.positions)
        assert torch.equal(a.labels, b.labels)
        assert difference(a.images, b.images) <= levels


@pytest.mark.parametrize("workers", [0, 2, 3])
def test_batches_decoded_on_the_device_are_those_of_pillow(index: Index, workers: int) -> None:
    left = next(stream(index, "gpu").batches())
    assert sorted(left.encoded) == [i for i, key in enumerate(left.keys) if int(key) % 3 == 0]
    assert_same(batches(stream(index, "gpu", workers), 9), batches(stream(index, "pil"), 9))


def test_the_rest_of_training_takes_them_as_they_are(index: Index) -> None:
    transform = DeviceTransform(AugmentConfig(), 5, 0.1, 0)
    for here, there in zip(batches(stream(index, "pil"), 2), batches(stream(index, "gpu"), 2), strict=True):
        for a, b in zip(transform(here, CPU), transform(there, CPU), strict=True):
            assert torch.equal(a, b)


def damaged_inside(data: bytes) -> bytes:
    """A JPEG with its end in place that Pillow refuses all the same: its first scan is gone."""
    at = data.index(b"\xff\xda")
    return data[:at] + b"\xff\xd9" + bytes(len(data) - at - 4) + b"\xff\xd9"


@pytest.mark.parametrize("workers", [0, 2])
def test_what_no_decoder_can_use_is_replaced_alike(tmp_path: Path, workers: int) -> None:
    folder = make_set(tmp_path, 97)
    for shard in (2, 5):
        tar = folder / f"odd-train-{shard:06d}.tar"
        member, data = next((m, d) for m, d in members(tar) if m.name.endswith(".jpg"))
        overwrite(tar, member.name, damaged_inside(data))
    damaged = read_index(folder)
    by_pillow = list(batches(stream(damaged, "pil"), 8))
    assert sum(len(batch.bad) for batch in by_pillow) == 2
    by_device = list(batches(stream(damaged, "gpu", workers), 8))
    for a, b in zip(by_pillow, by_device, strict=True):
        strip = lambda found: [dataclasses.replace(bad, reason="") for bad in found]  # noqa: E731
        assert strip(a.bad) == strip(b.bad)
    assert_same(
        [dataclasses.replace(b, bad=[]) for b in by_device],
        [dataclasses.replace(b, bad=[]) for b in by_pillow],
    )


def test_what_the_device_alone_cannot_decode_pillow_decodes(
    index: Index, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A device that refuses every other JPEG, as nvJPEG refuses arithmetic coding."""
    caplog.set_level(logging.INFO, logger="vmamba_dist")

    def picky(jpegs: list[bytes], device: torch.device) -> list[torch.Tensor]:
        if any(len(data) % 2 for data in jpegs):
            raise RuntimeError("unsupported\nstack")
        return [decode_by_torchvision(data) for data in jpegs]

    expected = list(batches(stream(index, "pil"), 8))
    made = stream(index, "gpu")
    decoder = DeviceDecoder(16, "bicubic", CPU, made.read_on_host)
    monkeypatch.setattr(ondevice, "decode_together", picky)
    assert_same(map(decoder, islice(made.batches(), 8)), expected)
    made.close()
    said = [
        record.message for record in caplog.records if "could not be decoded on the device" in record.message
    ]
    assert said == [
        "a JPEG could not be decoded on the device (unsupported): Pillow decodes it, and others like it"
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="states what a machine without CUDA answers")
def test_a_gpu_decoder_without_a_gpu_is_an_error_at_start(index: Index) -> None:
    from vmamba_dist.train.sources import open_sources  # the others need no training loop

    cfg = load_config([f"data.train={index.root}", "data.decoder=gpu", "data.global_batch=12"])
    with pytest.raises(
        ConfigError, match=r"data\.decoder=gpu: nvJPEG needs a CUDA device, and this run is on cpu"
    ):
        open_sources(cfg, 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnAGpu:
    """nvJPEG's pixels are not libjpeg's; everything after them is the same."""

    cuda = torch.device("cuda")

    @pytest.mark.parametrize("kind", ["420", "422", "444", "grey", "progressive"])
    def test_nvjpeg_is_close_to_libjpeg(self, kind: str) -> None:
        options: dict[str, object] = {"quality": 90}
        if kind.isdigit():
            options["subsampling"] = f"{kind[0]}:{kind[1]}:{kind[2]}"
        image = photo(333, 251).convert("L") if kind == "grey" else photo(333, 251)
        data = encoded(image, progressive=kind == "progressive", **options)
        (there,) = ondevice.decode_together([data], self.cuda)
        apart = (there.cpu().float() - to_tensor(decode(data)).float()).abs()
        assert there.shape == (3, 251, 333)
        assert apart.mean() < 3  # it upsamples colour in a plainer way
        assert apart.quantile(0.99) < 30

    def test_batches_are_close_to_pillows_and_equal_for_every_number_of_workers(self, tmp_path: Path) -> None:
        (tmp_path / "images" / "a").mkdir(parents=True)
        (tmp_path / "images" / "b").mkdir()
        for i in range(48):
            photo(90 + i, 140 - i, i % 2).save(tmp_path / "images" / "ab"[i % 2] / f"{i:03d}.jpg", quality=90)
        pack(tmp_path / "images", tmp_path / "set", samples_per_shard=8)
        made = read_index(tmp_path / "set")
        augment = AugmentConfig(randaugment_ops=0)

        def take(decoder: Decoder, workers: int) -> list[Batch]:
            data = DataConfig(image_size=32, global_batch=12, workers=workers, block=4, decoder=decoder)
            source = TrainStream(made, data, augment, seed=5, lanes=6, pin_memory=True)
            work = DeviceDecoder(32, "bicubic", self.cuda, source.read_on_host)
            ahead = Ahead(source.batches(), work, self.cuda)
            taken = [dataclasses.replace(b, images=b.images.cpu()) for b in islice(ahead, 8)]
            ahead.close()
            source.close()
            return taken

        alone = take("gpu", 0)
        assert_same(alone, take("gpu", 3))
        for there, here in zip(alone, take("pil", 0), strict=True):
            assert there.keys == here.keys
            assert (there.images.float() - here.images.float()).abs().mean() < 4
            shifted = there.images.roll(2, dims=3)
            assert (shifted.float() - here.images.float()).abs().mean() > 8

    def test_broken_and_odd_jpegs_take_the_hosts_way(self, index: Index) -> None:
        made = stream(index, "gpu")
        decoder = DeviceDecoder(16, "bicubic", self.cuda, made.read_on_host)
        batch = next(made.batches())
        row = min(batch.encoded)
        batch.encoded[row] = dataclasses.replace(batch.encoded[row], data=b"\xff\xd8 no jpeg \xff\xd9")
        out = decoder(batch)
        expected = next(stream(index, "pil").batches())
        assert torch.equal(out.images[row].cpu(), expected.images[row])
        assert out.keys == expected.keys
        assert out.images.is_cuda
        made.close()

    def test_the_step_sees_finished_images_though_the_host_never_waits(self, index: Index) -> None:
        transform = DeviceTransform(AugmentConfig(), 5, 0.1, 0)
        made = stream(index, "gpu", 2)
        ahead = Ahead(made.batches(), DeviceDecoder(16, "bicubic", self.cuda, made.read_on_host), self.cuda)
        sums = [transform(batch, self.cuda)[0].double().sum() for batch in islice(ahead, 16)]
        ahead.close()
        made.close()
        torch.cuda.synchronize()
        again = stream(index, "gpu")
        decoder = DeviceDecoder(16, "bicubic", self.cuda, again.read_on_host)
        for expected, batch in zip(sums, map(decoder, again.batches()), strict=False):
            torch.cuda.synchronize()
            assert torch.allclose(expected, transform(batch, self.cuda)[0].double().sum())
        again.close()

    def test_a_run_that_was_stopped_repeats_an_unbroken_one(self, tmp_path: Path) -> None:
        images = make_set(tmp_path / "images", count=64, num_classes=7)
        few = ["data.global_batch=4", "eval.split=train", "data.workers=2", "data.decoder=gpu"]
        assert train(words(images, tmp_path / "unbroken", *few, "run.max_steps=6")) == "paused"
        for last in (3, 6):
            assert train(words(images, tmp_path / "stopped", *few, f"run.max_steps={last}")) == "paused"
        assert [line["loss"] for line in metrics(tmp_path / "stopped")] == [
            line["loss"] for line in metrics(tmp_path / "unbroken")
        ]


def test_a_run_takes_torchvisions_decoder(tmp_path: Path) -> None:
    """Its losses are close to those with Pillow: the same samples, draws and, but for a level, pixels."""
    images = make_set(tmp_path / "images", count=64, num_classes=7)
    few = ["data.global_batch=4", "eval.split=train", "run.max_steps=2"]
    losses = {}
    for decoder in ("pil", "torchvision"):
        assert train(words(images, tmp_path / decoder, *few, f"data.decoder={decoder}")) == "paused"
        losses[decoder] = [line["loss"] for line in metrics(tmp_path / decoder)]
    assert losses["torchvision"] == pytest.approx(losses["pil"], rel=0.02)
