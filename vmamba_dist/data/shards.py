"""Sets of shards: packed, indexed, verified, shown; each in a file of its own, found here together.

Law: this file holds names only. index.py reads a set, pack.py and writer.py make one, verify.py checks one.
"""

from vmamba_dist.data.index import (
    INFO,
    SIZES,
    Bounds,
    Index,
    Listed,
    Offsets,
    Shard,
    describe,
    fingerprint_of,
    read_all,
    read_index,
    read_info,
    read_samples,
    read_split,
    write_whole,
)
from vmamba_dist.data.pack import PackReport, pack, share_of
from vmamba_dist.data.verify import ShardFault, VerifyReport, verify

__all__ = [
    "INFO",
    "SIZES",
    "Bounds",
    "Index",
    "Listed",
    "Offsets",
    "PackReport",
    "Shard",
    "ShardFault",
    "VerifyReport",
    "describe",
    "fingerprint_of",
    "pack",
    "read_all",
    "read_index",
    "read_info",
    "read_samples",
    "read_split",
    "share_of",
    "verify",
    "write_whole",
]
