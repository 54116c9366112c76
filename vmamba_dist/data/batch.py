"""What the stream hands over."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from vmamba_dist.data.draws import Draw


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be used, and what took its place: a line of bad.jsonl.

    In evaluation nothing takes its place: it is masked, and replacement_shard is "".
    """

    epoch: int
    position: int
    shard: str
    index: int  # in the shard
    key: str  # "" where even that is unknown
    reason: str
    replacement_shard: str = ""
    replacement_index: int = -1
    replacement_key: str = ""


@dataclass(frozen=True)
class Encoded:
    """A JPEG that the device will decode, and what is to become of it."""

    data: bytes
    width: int  # upright
    height: int
    orientation: int  # EXIF's
    draw: Draw


@dataclass
class Batch:
    """One rank's micro-batch, in position order; on the host until its images have gone to a GPU (ahead.py)."""

    images: Tensor  # (B, 3, S, S) uint8, channels last in memory as decoders leave them
    labels: Tensor  # (B,) int64
    positions: Tensor  # (B,) int64: in the epoch, ascending; -1 where evaluation pads
    keys: list[str]
    step: int  # of the data: epoch · steps_per_epoch + update of the epoch
    epoch: int
    mask: Tensor | None = None  # (B,) bool, evaluation only: false is padding or a bad sample
    bad: list[BadSample] = field(default_factory=list)
    encoded: dict[int, Encoded] = field(
        default_factory=dict
    )  # data.decoder=gpu: rows of images yet to be made
    on_host: Tensor | None = None  # what images on a device are a copy of

    def kept(self) -> Batch:
        """The same to be kept for later, without a device's memory where the host has the images too."""
        return self if self.on_host is None else replace(self, images=self.on_host, on_host=None)
