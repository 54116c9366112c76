"""A seeded fuzzer of tars and of what is in them: each mutation is a function of its seed.

MUTATIONS names the ways; `mutant(kind, seed)` is a tar that was damaged in that way.
"""

from __future__ import annotations

import gzip
import io
import random
import struct
import tarfile
import zlib
from collections.abc import Callable
from functools import cache

from PIL import Image

from shardsets import picture

BLOCK = 512
NUM_SAMPLES = 9
NUM_CLASSES = 5
Member = tuple[str, bytes]


def sound() -> list[Member]:
    """The members of a small shard: JPEG, PNG and WebP; labels as text and as JSON."""
    found: list[Member] = []
    for i in range(NUM_SAMPLES):
        form, suffix = (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"))[i % 3]
        file = io.BytesIO()
        picture(i).save(file, form)
        found.append((f"{i:04d}.{suffix}", file.getvalue()))
        label = f'{{"label": {i % NUM_CLASSES}}}' if i % 4 == 3 else str(i % NUM_CLASSES)
        found.append((f"{i:04d}.{'json' if i % 4 == 3 else 'cls'}", label.encode()))
    return found


def tar_of(members: list[Member], change: Callable[[int, tarfile.TarInfo], None] | None = None) -> bytes:
    """A tar of these members; change(number, header) may alter a header but for its size."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for i, (name, data) in enumerate(members):
            header = tarfile.TarInfo(name)
            header.size = len(data)
            if change is not None:
                change(i, header)
            tar.addfile(header, io.BytesIO(data))
    return file.getvalue()


def headers(tar: bytes) -> list[int]:
    """Where the headers of a sound tar are."""
    found, at = [], 0
    while at < len(tar) and tar[at] != 0:
        found.append(at)
        at += BLOCK - -int(tar[at + 124 : at + 135], 8) // BLOCK * BLOCK
    return found


def set_field(tar: bytearray, header: int, start: int, data: bytes) -> None:
    """Overwrite a header's field and mend its checksum, so that it is believed."""
    tar[header + start : header + start + len(data)] = data
    tar[header + 148 : header + 156] = b" " * 8
    total = sum(tar[header : header + BLOCK])
    tar[header + 148 : header + 156] = b"%06o\0 " % total


def _truncated(rng: random.Random) -> bytes:
    tar = tar_of(sound())
    return tar[: rng.randrange(headers(tar)[-1] + 2 * BLOCK)]


def _bits(rng: random.Random) -> bytes:
    tar = bytearray(tar_of(sound()))
    end = headers(tar)[-1] + 2 * BLOCK
    for _ in range(rng.choice((1, 3, 30, 300))):
        tar[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(tar)


def _blocks(rng: random.Random) -> bytes:
    tar = tar_of(sound())
    blocks = [tar[i : i + BLOCK] for i in range(0, len(tar), BLOCK)]
    for _ in range(rng.choice((1, 2, 5))):
        a, b = rng.randrange(len(blocks)), rng.randrange(len(blocks))
        match rng.randrange(5):
            case 0:
                blocks[a], blocks[b] = blocks[b], blocks[a]
            case 1:
                blocks.insert(a, blocks[b])
            case 2:
                del blocks[a]
            case 3:
                blocks[a] = rng.choice((bytes(BLOCK), b"\xff" * BLOCK))
            case 4:
                blocks[a] = rng.randbytes(BLOCK)
    return b"".join(blocks)


def _sizes(rng: random.Random) -> bytes:
    tar = bytearray(tar_of(sound()))
    size = rng.choice(
        (
            b"77777777777\0",
            b"\x80" + (2**62).to_bytes(11, "big"),
            b"\xff" + (2**88 - 512).to_bytes(11, "big"),  # -512
            b"\xff" * 12,  # -1
            b"%011o\0" % rng.randrange(4096),
            b"00000000000\0",
            b"x0000000010\0",
            b" " * 12,
        )
    )
    set_field(tar, rng.choice(headers(bytes(tar))), 124, size)
    return bytes(tar)


def _kinds(rng: random.Random) -> bytes:
    tar = bytearray(tar_of(sound()))
    set_field(
        tar,
        rng.choice(headers(bytes(tar))),
        156,
        rng.choice(b"0123456 7gxLKSXDMVN\x00\xffz").to_bytes(1, "big"),
    )
    return bytes(tar)


def _links(rng: random.Random) -> bytes:
    where = rng.randrange(2 * NUM_SAMPLES)
    kind = rng.choice((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE))
    target = rng.choice(("/etc/passwd", "../../x", "0001.png", "0000.jpg", "", "/dev/zero"))

    def change(i: int, header: tarfile.TarInfo) -> None:
        if i == where:
            header.type, header.linkname, header.size = kind, target, 0

    return tar_of(sound(), change)


def _names(rng: random.Random) -> bytes:
    members = sound()
    name = rng.choice(
        (
            "../../x.png",
            "/tmp/escaped.png",
            "../../../../../../etc/x.cls",
            "..",
            ".",
            ".cls",
            "x",
            "",
            "a/" * 200 + "x.jpg",
            "n" * 5000 + ".png",
            "\n.png",
            "a\x01b.jpg",
            "\udcff\udcfe.jpg",
            "__meta__/x.png",
            "C:\\x.png",
            "~/x.jpg",
            "0001.jpg.png",
            "0000.JPG",
            "x.pkl",
            "0000.pkl",
            "0000.pth",
        )
    )
    for i in rng.sample(range(len(members)), rng.choice((1, 2))):
        suffix = members[i][0].split(".")[1]
        keep = rng.random() < 0.5
        members[i] = (f"{name.rpartition('.')[0] or name}.{suffix}" if keep else name, members[i][1])
    return tar_of(members)


def _twice(rng: random.Random) -> bytes:
    members = sound()
    for _ in range(rng.choice((1, 2, 6))):
        i = rng.randrange(len(members))
        members.insert(rng.choice((i, i + 1, rng.randrange(len(members)))), members[i])
    return tar_of(members)


def _order(rng: random.Random) -> bytes:
    members = sound()
    if rng.random() < 0.5:
        rng.shuffle(members)
    for _ in range(rng.randrange(4)):
        del members[rng.randrange(len(members))]
    return tar_of(members)


LABELS = (
    b"",
    b" ",
    b"5",
    b"-1",
    b"1.0",
    b"1e3",
    b"0x1",
    b"cat",
    b"nan",
    b"9" * 4000,
    b"9" * 400_000,
    b"\xff\xfe",
    b"1\x00",
    "²".encode(),
    "٣".encode(),
    b"1 2",
    b"True",
    b"null",
    b"[1]",
    b"{}",
    b'{"label": null}',
    b'{"label": "1"}',
    b'{"label": 1.0}',
    b'{"label": true}',
    b'{"label": [1]}',
    b'{"label": {"label": 1}}',
    b'{"label": 1e400}',
    b'{"label": NaN}',
    b'{"label": ' + b"9" * 5000 + b"}",
    b'{"label": 99999999999999999999}',
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b'"\\ud800"',
    b"\x80\x04\x95c__builtin__\nexec\n.",
)


def _labels(rng: random.Random) -> bytes:
    members = sound()
    for i in rng.sample([i for i, (name, _) in enumerate(members) if name.endswith(("cls", "json"))], 2):
        name = members[i][0].split(".")[0] + rng.choice((".cls", ".json"))
        members[i] = (name, rng.choice(LABELS))
    return tar_of(members)


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int, height: int, depth: int = 8, color: int = 2, extra: bytes = b"", data: bytes = b""
) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _jpeg_of(width: int, height: int) -> bytes:
    """A JPEG whose header tells another size."""
    file = io.BytesIO()
    picture(1).save(file, "JPEG")
    data = bytearray(file.getvalue())
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


ZEROS = zlib.compress(bytes(40 << 20), 9)  # 40 MiB in 40 kB
BOMBS = (
    lambda: png(60_000, 60_000, data=ZEROS),
    lambda: png(9_500, 9_500, data=ZEROS),  # just above the limit
    lambda: png(2**31 - 1, 2**31 - 1),
    lambda: png(0, 0),
    lambda: png(1, 2**31 - 1, 1, 0),
    lambda: png(16, 16, extra=chunk(b"zTXt", b"a\0\0" + ZEROS), data=zlib.compress(bytes(16 * 49))),
    lambda: png(16, 16, extra=chunk(b"iCCP", b"a\0\0" + ZEROS), data=zlib.compress(bytes(16 * 49))),
    lambda: png(16, 16, extra=chunk(b"iTXt", b"a\0\1\0\0\0" + ZEROS), data=zlib.compress(bytes(16 * 49))),
    lambda: png(
        16, 16, extra=chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)), data=zlib.compress(bytes(784))
    ),
    lambda: png(16, 16, extra=chunk(b"eXIf", b"MM\0*" + b"\xff" * 64), data=zlib.compress(bytes(784))),
    lambda: _jpeg_of(65_500, 65_500),
    lambda: _jpeg_of(0, 0),
    lambda: _jpeg_of(9_000, 9_000),
    lambda: b"RIFF\xff\xff\xff\xffWEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff" * 6 + b"VP8 ",
    lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n",
    lambda: b"GIF89a\xff\xff\xff\xff\0\0\0,",
    lambda: b"<svg onload='x'/>",
    lambda: b"",
    lambda: b"\xff\xd8\xff",
    lambda: gzip.compress(bytes(1 << 20)),
)


def _bombs(rng: random.Random) -> bytes:
    members = sound()
    i = 2 * rng.randrange(NUM_SAMPLES)
    members[i] = (members[i][0], rng.choice(BOMBS)())
    return tar_of(members)


def _images(rng: random.Random) -> bytes:
    """Flipped bits, cuts and splices inside the image files, their headers first."""
    members = sound()
    for i in range(0, 2 * NUM_SAMPLES, 2):
        data = bytearray(members[i][1])
        for _ in range(rng.choice((0, 1, 4))):
            at = rng.randrange(min(len(data), 64)) if rng.random() < 0.5 else rng.randrange(len(data))
            match rng.randrange(4):
                case 0:
                    data[at] ^= 1 << rng.randrange(8)
                case 1:
                    data[at : at + 4] = rng.choice((b"\xff" * 4, bytes(4), rng.randbytes(4)))
                case 2:
                    data = data[: max(1, at)]
                case 3:
                    data[at:at] = rng.randbytes(rng.randrange(40))
        members[i] = (members[i][0], bytes(data))
    return tar_of(members)


def _extended(rng: random.Random) -> bytes:
    """Pax and GNU headers that rename, resize or spread a member."""
    members = sound()
    where = rng.randrange(len(members))
    fields = rng.choice(
        (
            {"path": "../../x.png"},
            {"path": "/tmp/escaped.jpg"},
            {"path": ""},
            {"size": "99999999999999"},
            {"size": "-5"},
            {"size": "x"},
            {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(1 << 40)},
            {"GNU.sparse.size": str(1 << 40), "GNU.sparse.map": f"0,1,{1 << 39},1"},
            {"GNU.sparse.map": "1,x"},
            {"hdrcharset": "BINARY", "path": "\udcff"},
            {"mtime": "nan"},
            {"linkpath": "/etc/passwd"},
            {"comment": "c" * 70_000},
        )
    )
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, errors="surrogateescape") as tar:
        for i, (name, data) in enumerate(members):
            header = tarfile.TarInfo(name)
            header.size = len(data)
            if i == where:
                header.pax_headers = fields
            tar.addfile(header, io.BytesIO(data))
    return file.getvalue()


def sparse_bomb() -> bytes:
    """A GNU sparse member of 512 bytes that says it unpacks to 64 GiB of zeros."""
    tar = bytearray(tar_of(sound()))
    header = headers(bytes(tar))[4]
    set_field(tar, header, 156, b"S")
    set_field(tar, header, 257, b"ustar  \0")
    set_field(tar, header, 386, b"%011o\0%011o\0" % (0, 512))
    set_field(tar, header, 482, b"\0")
    set_field(tar, header, 483, b"\x80" + (1 << 36).to_bytes(11, "big"))
    return bytes(tar)


def gzip_bomb() -> bytes:
    """A header that is a gzip stream as well: its first member's name is the magic, its file name holds the rest."""
    inner = tarfile.TarInfo("0000.png")
    inner.size = 300 << 20
    file = io.BytesIO()
    with gzip.GzipFile(fileobj=file, mode="wb", mtime=0) as stream:
        stream.write(inner.tobuf())
        for _ in range(300):
            stream.write(bytes(1 << 20))
    members = sound()
    key = "\x1f\x8b\x08\x08aaaaaa" + "b" * 20
    members[:2] = [
        (f"{key}.jpg", b"\0" + file.getvalue()[10:]),
        (f"{key}.cls", b"1"),
    ]  # \0 ends the file name
    return tar_of(members)


def _polyglots(rng: random.Random) -> bytes:
    tar = rng.choice((_sparse, _sparse, _gzip))()
    return tar if rng.random() < 0.7 else gzip.compress(tar)


_sparse, _gzip = cache(sparse_bomb), cache(gzip_bomb)


MUTATIONS: dict[str, Callable[[random.Random], bytes]] = {
    "truncated": _truncated,
    "bits": _bits,
    "blocks": _blocks,
    "sizes": _sizes,
    "kinds": _kinds,
    "links": _links,
    "names": _names,
    "twice": _twice,
    "order": _order,
    "labels": _labels,
    "bombs": _bombs,
    "images": _images,
    "extended": _extended,
    "polyglots": _polyglots,
}


def mutant(kind: str, seed: int) -> bytes:
    return MUTATIONS[kind](random.Random(f"{kind} {seed}"))


__all__ = ["BOMBS", "LABELS", "MUTATIONS", "NUM_CLASSES", "NUM_SAMPLES", "Image", "mutant", "sound", "tar_of"]
