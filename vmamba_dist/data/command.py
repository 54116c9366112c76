"""`vmamba shards`: pack, verify and show sets of shards."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vmamba_dist.data import sidecar
from vmamba_dist.data.shards import describe, pack, verify


def main(words: Sequence[str]) -> int:
    """Run one shards command; 1 where a set has faults."""
    parser = argparse.ArgumentParser(prog="vmamba shards", description="Make and check WebDataset shards.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    packing = verbs.add_parser(
        "pack",
        help="make shards from images",
        description=pack.__doc__.splitlines()[0] if pack.__doc__ else None,
    )
    packing.add_argument(
        "source", help="an image folder (a class a folder), a CSV file (path,label[,split]), or digits"
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
        "--shard-mib", type=float, default=128.0, help="close a shard at this size (%(default)g MiB)"
    )
    packing.add_argument("--overwrite", action="store_true", help="replace the set that is there")
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
    given = parser.parse_args(words)
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
                    overwrite=given.overwrite,
                )
            )
            sidecar.write_all(given.out, at_least=sidecar.LARGE)
        case "verify":
            report = verify(given.folder, progress=_progress if sys.stderr.isatty() else None)
            print(report)
            if report.ok and given.sidecar:
                print(*(f"wrote {path}" for path in sidecar.write_all(given.folder)), sep="\n")
            return 0 if report.ok else 1
        case "show":
            print(describe(given.folder))
    return 0


def _progress(done: int, total: int) -> None:
    print(f"\r{done}/{total} shards", end="\n" if done == total else "", file=sys.stderr, flush=True)
