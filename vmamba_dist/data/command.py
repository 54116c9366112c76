"""`vmamba shards`: make, verify and show sets of shards."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from vmamba_dist.config.schema import ConfigError
from vmamba_dist.data import sidecar
from vmamba_dist.data.encode import FORMATS
from vmamba_dist.data.shards import describe, pack, verify

FRACTALS = "data/fractals"  # where fractals go when no folder is said


def main(words: Sequence[str]) -> int:
    """Run one shards command; 1 where a set has faults."""
    parser = argparse.ArgumentParser(prog="vmamba shards", description="Make and check WebDataset shards.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    _add_pack(verbs.add_parser("pack", help="make shards from images", description=_first_line(pack)))
    for name, text in {
        "verify": "read everything: sha256, counts, every image",
        "show": "what a set holds",
    }.items():
        verb = verbs.add_parser(name, help=text)
        verb.add_argument("folder")
        if name == "verify":
            verb.add_argument(
                "--sidecar", action="store_true", help="write the index of a large set that needs no parsing"
            )
    fractal = verbs.add_parser("fractal", help="make labelled images from formulas, as many as you like")
    fractal.add_argument(
        "words",
        nargs="+",
        metavar="word",
        help=f"the folder to make ({FRACTALS} where none is said), then classes=100 per_class=1000 …",
    )
    fractal.add_argument("--overwrite", action="store_true", help="replace the set that is there")
    given = parser.parse_args(words)
    progress = _progress if sys.stderr.isatty() else None
    match given.verb:
        case "pack":
            print(
                pack(
                    given.source,
                    given.out,
                    name=given.name,
                    split=given.split,
                    holdout=given.holdout,
                    shuffle=not given.no_shuffle,
                    seed=given.seed,
                    samples_per_shard=given.samples_per_shard,
                    shard_mib=given.shard_mib,
                    check=given.check,
                    max_side=given.max_side,
                    encode=given.encode,
                    quality=given.quality,
                    image_column=given.image_column,
                    label_column=given.label_column,
                    workers=given.workers,
                    overwrite=given.overwrite,
                    progress=progress,
                )
            )
            sidecar.write_all(given.out, at_least=sidecar.LARGE)
        case "verify":
            report = verify(given.folder, progress=progress)
            print(report)
            if report.ok and given.sidecar:
                print(*(f"wrote {path}" for path in sidecar.write_all(given.folder)), sep="\n")
            return 0 if report.ok else 1
        case "show":
            print(describe(given.folder))
        case "fractal":
            fractals = _fractals()
            out, rest = _folder(given.words)
            config = fractals.read_words(rest)
            print(fractals.fractal(out, config, overwrite=given.overwrite, progress=progress))
    return 0


def _add_pack(packing: argparse.ArgumentParser) -> None:
    packing.add_argument(
        "source",
        help="an image folder (a class a folder), a CSV or Parquet file (path,label[,split]), a dataset that "
        "Hugging Face's datasets saved to disk, a tar, a folder of tars, a set of shards, or digits",
    )
    packing.add_argument("out", help="the folder to make")
    packing.add_argument("--name", help="the shards' first name; default: the source's")
    packing.add_argument(
        "--split", default="train", help="for samples without one of their own (%(default)s)"
    )
    packing.add_argument(
        "--holdout", type=float, help="share that goes to split test, by a hash of the sample's id"
    )
    packing.add_argument(
        "--no-shuffle", action="store_true", help="keep the source's order; a run mixes only near samples"
    )
    packing.add_argument("--seed", type=int, default=0, help="of the shuffle (%(default)s)")
    packing.add_argument("--samples-per-shard", type=int, help="close a shard at so many samples")
    packing.add_argument(
        "--shard-mib", type=float, default=128.0, help="close a shard at about this size (%(default)g MiB)"
    )
    packing.add_argument(
        "--check",
        choices=("header", "decode"),
        default="header",
        help="leave out what has no readable header, or what cannot be decoded (%(default)s)",
    )
    packing.add_argument("--max-side", type=int, help="resize images whose longer side has more px")
    packing.add_argument("--encode", choices=FORMATS, help="encode every image anew in this format")
    packing.add_argument("--quality", type=int, default=90, help="of new JPEGs and WebPs (%(default)s)")
    packing.add_argument("--image-column", help="of a list: path; of a saved dataset: its only image column")
    packing.add_argument("--label-column", help="of a list: label; of a saved dataset: its only class column")
    packing.add_argument("--workers", type=int, help="processes; default: one a core")
    packing.add_argument("--overwrite", action="store_true", help="replace the set that is there")


def _folder(words: Sequence[str]) -> tuple[str, list[str]]:
    """The folder to make, a word of its own or out=FOLDER, and the other words."""
    bare = next((word for word in words if "=" not in word), None)
    if bare is not None:
        rest = list(words)
        rest.remove(bare)
        return bare, rest
    said = [word for word in words if word.startswith("out=")]
    if not said:
        return FRACTALS, list(words)
    folder = said[-1].removeprefix("out=")
    if not folder:
        raise ConfigError("out= names no folder; write for example out=data/fractals")
    return folder, [word for word in words if word not in said]


def _fractals() -> ModuleType:
    """Import data/datasets/fractals.py, and with it numba. Raises ConfigError where it is missing."""
    try:
        return importlib.import_module("vmamba_dist.data.datasets.fractals")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "numba":
            raise
        raise ConfigError(
            "fractals are drawn with the package numba, which is not installed; pip install 'vmamba-dist[fractals]'"
        ) from error


def _first_line(function: object) -> str:
    return (function.__doc__ or "").splitlines()[0]


def _progress(done: int, total: int) -> None:
    print(f"\r{done}/{total} shards", end="\n" if done == total else "", file=sys.stderr, flush=True)
