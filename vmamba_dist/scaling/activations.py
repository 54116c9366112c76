"""The bytes that one micro-batch's forward and backward hold, counted operation by operation and without torch.

Law: a count follows the model's code on CUDA. A part of the model (stem, block, downsample, head) is a chain of rows:
what an operation keeps for its backward, and its output, which is also its gradient's size. In the backward of a row
there live what it and the rows before it keep, its two gradients, and the gradient that waits at the residual. The same
step under torch's memory tracker is the test.

Letters: C width of a block, D its inner channels, H hidden, N states, R time-step rank, K directions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from vmamba_dist.models.flops import feature_sizes
from vmamba_dist.models.variants import STRIDE, Variant, dt_rank
from vmamba_dist.scaling.tiles import Cut, cut

Policy = Literal["off", "selective", "block"]
POLICIES: tuple[Policy, ...] = ("off", "selective", "block")  # from the most memory to the least

FLOAT32 = 4  # bytes
K = 4
LINES = 64  # steps a chunk of the plain scan, which the cascade pattern uses
ROWS = 16  # segments that a program of the fused scan walks at once
WEIGHT_GROUP = 1024  # tokens of a partial sum of the time steps' weights' gradient, where dz is kept
FEW_TOKENS = 16  # of a shorter image its backward adds the projection's gradient in float32


@dataclass(frozen=True)
class Row:
    """One operation, in bytes unless said."""

    name: str
    out: int
    keeps: int = 0  # for its backward, beside what rows before it keep
    weights: int = 0  # elements that are multiplied in the compute precision
    plain: int = 0  # elements that are used in float32
    beside: int = 0  # gradients and temporaries in its backward, beside those of its input and output
    hidden: int = 0  # within its backward's own code, where no tracker of torch's sees it
    spent: int = 0  # of what it keeps, used up and let go before that, if the part was run again
    flops: int = 0  # of the forward's matrix products and convolutions, two a multiply-add
    states: int = 0  # of what it keeps, a scan's second output
    scanned: int = 0  # elements that a scan walks over, each by 4 directions and N states


@dataclass(frozen=True)
class Part:
    """A chain of rows from an input to the last row's output."""

    rows: tuple[Row, ...]
    input: int  # bytes
    is_stem: bool = False  # its input, the samples, is kept by others and wants no gradient
    is_block: bool = False
    ends_stage: bool = False  # the model holds its output to the end of the forward
    fused: Row | None = (
        None  # all of it as one node (models/fused.py), which selective recompute does without
    )

    @property
    def params(self) -> int:
        return sum(row.weights + row.plain for row in self.rows)

    def as_run(self, policy: Policy) -> tuple[Row, ...]:
        """The operations that autograd sees."""
        return self.rows if self.fused is None or policy == "selective" else (self.fused,)

    def is_recomputed(self, policy: Policy) -> bool:
        """Whether the backward runs the part again."""
        return policy == "block" if self.is_stem else self.is_block and policy != "off"

    def kept(self, policy: Policy) -> int:
        """Bytes kept from the forward to the backward, casts of weights aside."""
        if not self.is_recomputed(policy):
            return sum(row.keeps for row in self.as_run(policy))
        scans = [row for row in self.rows if row.scanned] if policy == "selective" else []
        return (0 if self.is_stem else self.input) + sum(row.states + row.out for row in scans)

    def cast(self, policy: Policy) -> int:
        """Elements of weights whose cast is kept from the forward to the backward."""
        return 0 if self.is_recomputed(policy) else sum(row.weights for row in self.rows)

    def inputs(self) -> list[int]:
        """Bytes of each row's input."""
        return [self.input, *(row.out for row in self.rows[:-1])]

    def cached(self, policy: Policy) -> int:
        """Elements of weights whose cast autocast holds to the end of the forward, though nothing else does."""
        return 0 if len(self.as_run(policy)) == 1 and self.fused else self.cast("off") - self.cast(policy)


@dataclass(frozen=True)
class WeightBytes:
    """What an engine holds for an element of the weights while a micro-batch runs."""

    cast: float = 2  # autocast's copy in the compute precision; 0: the engine hands the weights out in it
    made: float = 2  # gradient as the backward makes it
    kept: float = 4  # gradient that stays until the update: 4, or the rank's share of it
    accumulating: bool = False  # gradients of the micro-batch before are there already


class Peak(NamedTuple):
    """The worst moment: all bytes, and how many of them are gradients of weights that stay."""

    bytes: float
    gradients: float


def peak(parts: Iterable[Part], policy: Policy, weights: WeightBytes, *, hidden: bool = True) -> Peak:
    """The most bytes at any time of a forward and backward: activations, casts of weights, gradients.

    Without `hidden`: what torch's trackers see.
    """
    chain = tuple(parts)
    gradients = weights.kept * sum(part.params for part in chain) if weights.accumulating else 0.0
    live = sum(part.kept(policy) + weights.cast * part.cast(policy) for part in chain)
    # Autocast's cache lasts to the end of the forward, and the model's list of stages too.
    cached = weights.cast * sum(part.cached(policy) for part in chain)
    stages = sum(part.rows[-1].out for part in chain if part.ends_stage)
    most = Peak(live + cached + stages + gradients, gradients)
    for part in reversed(chain):
        live -= part.kept(policy) + weights.cast * part.cast(policy)
        rows = part.as_run(policy)
        own = sum(row.keeps + weights.cast * row.weights for row in rows)
        into = [0 if part.is_stem else part.input, *(row.out for row in rows[:-1])]
        for row, gradient in zip(reversed(rows), reversed(into), strict=True):
            made = weights.made * row.weights + FLOAT32 * row.plain
            unseen = max(0, row.hidden - (row.spent if part.is_recomputed(policy) else 0)) if hidden else 0
            inside = own + row.out + gradient + row.beside + made + unseen
            most = max(most, Peak(live + gradients + inside, gradients))
            if row is part.fused and weights.cast:  # at its end all gradients are there in both precisions
                ending = own + row.out + gradient + made + FLOAT32 * row.weights
                most = max(most, Peak(live + gradients + ending, gradients))
            own -= row.keeps + weights.cast * row.weights
            if not weights.accumulating:
                gradients += weights.kept * (row.weights + row.plain)
            most = max(most, Peak(live + gradients + own + gradient + row.beside + made, gradients))
    return most


def parts(
    variant: Variant,
    size: int,
    batch: int,
    *,
    compute: int,
    classes: int,
    generation: str,
    cascade: bool = False,
    fuse: bool = True,
) -> Iterator[Part]:
    """Yield the parts of a model in order, for `batch` images of size x size px and `compute` bytes an element.

    `generation` is the device's, sm_90: it decides how the scan is cut. `cascade` is the scan pattern of that name.
    `fuse`: blocks run as one node where they can.
    """
    yield _stem(variant, size, batch, compute)
    residual, before, dim_before = FLOAT32, 0, 0
    for dim, depth, (height, width) in zip(
        variant.dims, variant.depths, feature_sizes(variant, size, size), strict=True
    ):
        tokens = batch * height * width
        if before:
            yield _downsample(variant, dim_before, dim, before, tokens, residual, compute)
            residual = compute if variant.downsample == "v1" else FLOAT32
        block = _Block(variant, dim, batch, height, width, residual, compute, generation, cascade)
        rows = tuple(block.rows())
        one = block.fused(rows) if fuse and block.fusible else None
        for i in range(depth):
            yield Part(rows, residual * dim * tokens, is_block=True, ends_stage=i == depth - 1, fused=one)
        before, dim_before = tokens, dim
    head = Row(
        "head",
        FLOAT32 * classes * batch,
        keeps=(compute * dim_before + FLOAT32 * classes) * batch,
        weights=(dim_before + 1) * classes,
        beside=2 * FLOAT32 * classes * batch,
        flops=2 * dim_before * classes * batch,
    )
    norm = _norm("norm", dim_before, before, residual)
    yield Part((*norm, Row("pool", FLOAT32 * dim_before * batch), head), residual * dim_before * before)


@dataclass(frozen=True)
class _Block:
    variant: Variant
    dim: int
    batch: int
    height: int
    width: int
    residual: int  # bytes an element of the residual stream
    compute: int
    generation: str
    cascade: bool

    @property
    def tokens(self) -> int:
        return self.batch * self.height * self.width

    @property
    def inner(self) -> int:
        return self.variant.inner(self.dim)

    def rows(self) -> Iterator[Row]:
        size = self.residual * self.dim * self.tokens
        yield from _waiting(self._mixer(), size)
        yield Row("add", size)
        if self.variant.mlp_ratio > 0:
            yield from _waiting(self._mlp(), size)
            yield Row("add2", size)

    @property
    def fusible(self) -> bool:
        """As Block._fuses says."""
        return self.variant.mlp_ratio > 0 and not self.variant.gate and not self.cascade

    def fused(self, rows: tuple[Row, ...]) -> Row:
        """The block as one node: what models/fused.py keeps, and the worst moments of its backward in order."""
        dim, d, hidden, compute = self.dim, self.inner, self.variant.hidden(self.dim), self.compute
        scan = next(row for row in rows if row.name == "scan")
        pitch = K * (-(-(dt_rank(dim) + 2 * self.variant.d_state) // 8) * 8)
        statistics = 3 * 2 * FLOAT32
        kept = 2 * self.residual * dim + compute * (3 * d + pitch) + statistics
        stream, narrow, inner = self.residual * dim, compute * dim, compute * d
        scanning = stream + 3 * inner + compute * pitch
        moments = (
            2 * narrow + 2 * compute * hidden,  # GELU's backward, in place
            stream + 3 * narrow,  # norm2's
            stream + narrow + 3 * inner,  # out_norm's
            scanning,  # the scan's, and the projection's
            2 * stream + inner + 3 * narrow,  # norm's
        )
        worst = self.tokens * max(moments)
        return Row(
            "block",
            stream * self.tokens,
            keeps=kept * self.tokens + scan.states,
            weights=sum(row.weights for row in rows),
            plain=sum(row.plain for row in rows),
            beside=worst - stream * self.tokens,  # the input's gradient is counted as that
            hidden=max(0, self.tokens * scanning + scan.hidden - worst),
            spent=self.tokens * (stream + inner),  # the sum after the first branch, and the scan's output
            flops=sum(row.flops for row in rows),
            states=scan.states,
            scanned=scan.scanned,
        )

    def _mlp(self) -> Iterator[Row]:
        dim, hidden, compute = self.dim, self.variant.hidden(self.dim), self.compute
        yield from _norm("norm2", dim, self.tokens, self.residual, compute)
        yield _linear("fc1", dim, hidden, self.tokens, compute, bias=True)
        yield Row("gelu", compute * hidden * self.tokens, keeps=compute * hidden * self.tokens)
        yield _linear("fc2", hidden, dim, self.tokens, compute, bias=True)
        yield from self._masked("mlp")

    def _mixer(self) -> Iterator[Row]:
        dim, d, tokens, compute = self.dim, self.inner, self.tokens, self.compute
        one = compute * d * tokens  # bytes of a tensor of inner channels
        gate = 2 if self.variant.gate else 1
        yield from _norm("norm", dim, tokens, self.residual, compute)
        yield _linear("in_proj", dim, gate * d, tokens, compute)
        convolved = Row(
            "conv",
            one,
            keeps=gate * one,
            weights=9 * d + (d if self.variant.conv_bias else 0),
            flops=2 * 9 * d * tokens,
        )
        scanned = (
            convolved,
            Row("silu", one, keeps=one),
            *(self._cascade() if self.cascade else self._scan()),
            *_norm("out_norm", d, tokens, compute, compute),
        )
        # The gate's own gradient waits from the product to in_proj.
        yield from _waiting(scanned, one if self.variant.gate else 0)
        if self.variant.gate:
            yield Row("gate", one, keeps=2 * one, beside=one)
        yield _linear("out_proj", d, dim, tokens, compute)
        yield from self._masked("ssm")

    def _masked(self, name: str) -> Iterator[Row]:
        """A branch times its mask; without drop path there is none."""
        if self.variant.drop_path_rate > 0:
            product = FLOAT32 * self.dim * self.tokens
            yield Row(f"{name}.mask", product, beside=product if self.compute != FLOAT32 else 0)
            yield from _cast(f"{name}.cast", self.dim * self.tokens, self.compute)

    def _scan(self) -> Iterator[Row]:
        """The projection and the fused scan."""
        d, n, r, tokens, compute = (
            self.inner,
            self.variant.d_state,
            dt_rank(self.dim),
            self.tokens,
            self.compute,
        )
        one = compute * d * tokens
        pitch = -(-(r + 2 * n) // 8) * 8
        length = self.height * self.width
        how = cut(self.generation, d, length, n, compute)
        segments = self.batch * -(-length // how.span)
        states = compute * K * segments * (how.span // how.steps) * n * d
        projection = _linear("x_proj", d, K * pitch, tokens, compute)
        # The scan's gradient of x waits while the projection's is made.
        yield replace(projection, beside=one, weights=K * (r + 2 * n) * d)
        yield Row(
            "scan",
            one,
            keeps=compute * K * pitch * tokens + states,
            states=states,
            weights=K * d * r,
            plain=K * d * (n + 2),
            beside=one,
            hidden=self._scan_scratch(how, segments, pitch),
            scanned=d * n * tokens,
        )

    def _scan_scratch(self, how: Cut, segments: int, pitch: int) -> int:
        """The backward's starts of segments, float32 sum of dx and partial sums (vmamba_kernels/ss2d/fused.py)."""
        d, n, r = self.inner, self.variant.d_state, dt_rank(self.dim)
        blocks, groups = -(-d // how.channels), -(-segments // ROWS)
        starts = FLOAT32 * K * segments * n * d
        projected = K * pitch * self.tokens
        wide = n > 1 or self.height * self.width < FEW_TOKENS  # as partial_is_wide has it
        partial = (FLOAT32 if wide else self.compute) * blocks * projected
        weight_groups = groups
        if how.apart and n == 1:  # dz, and sums of two columns
            partial = K * self.tokens * (self.compute * d + FLOAT32 * 2 * blocks)
            weight_groups = -(-self.tokens // WEIGHT_GROUP)
        parameters = FLOAT32 * d * (weight_groups * K * (r + 1) + groups * (K * n + 1))
        total = FLOAT32 * d * self.tokens if self.compute != FLOAT32 and n > 1 else 0  # as sum_is_wide has it
        # Ends, decays and starts are there together before the sums are.
        return max(3 * starts, starts + total + partial + parameters)

    def _cascade(self) -> Iterator[Row]:
        """Every row of the image as a sequence, then every column: two plain scans of two directions each."""
        d, n, r, tokens, compute = (
            self.inner,
            self.variant.d_state,
            dt_rank(self.dim),
            self.tokens,
            self.compute,
        )
        both = 2 * compute * d * tokens
        narrow = 2 * (r + 2 * n)
        for axis, length in (("rows", self.width), ("columns", self.height)):
            states = FLOAT32 * 2 * d * n * (tokens // length) * (-(-length // LINES) - 1)
            copies = (
                compute * 2 * d * r * (tokens // length)
            )  # of the dt weights: a batched product wants one a line
            yield from _cast(f"{axis}.float", d * tokens, FLOAT32, compute)
            yield Row(f"{axis}.norm", FLOAT32 * d * tokens, keeps=FLOAT32 * (d + 2) * tokens)
            yield from _cast(f"{axis}.cast", d * tokens, compute)
            yield replace(_linear(f"{axis}.x_proj", d, narrow, tokens, compute), beside=both)
            yield Row(f"{axis}.stack", compute * narrow * tokens, beside=both)
            yield Row(
                f"{axis}.dt",
                both,
                keeps=compute * narrow * tokens + copies,
                weights=2 * d * r,
                beside=both + copies,
                flops=2 * 2 * d * r * tokens,
            )
            yield Row(f"{axis}.turn", both, beside=both)
            yield Row(
                f"{axis}.scan",
                both,
                keeps=2 * both + states,
                states=states,
                plain=2 * d * (n + 2),
                beside=both,
                scanned=d * n * tokens // 2,
            )
            yield Row(f"{axis}.sum", both // 2)


def _waiting(rows: Iterable[Row], size: int) -> Iterator[Row]:
    """Give the rows with another gradient waiting beside theirs."""
    return (replace(row, beside=row.beside + size) for row in rows)


def _norm(name: str, dim: int, tokens: int, came: int, to: int = FLOAT32) -> Iterator[Row]:
    """A LayerNorm in float32, of `came` and to `to` bytes an element: it keeps its input as it came."""
    yield Row(name, FLOAT32 * dim * tokens, keeps=(came * dim + 2 * FLOAT32) * tokens, plain=2 * dim)
    yield from _cast(f"{name}.cast", dim * tokens, to)


def _cast(name: str, size: int, to: int, came: int = FLOAT32) -> Iterator[Row]:
    """A cast of `size` elements, where there is one."""
    if to != came:
        yield Row(name, to * size)


def _linear(name: str, wide: int, out: int, tokens: int, compute: int, bias: bool = False) -> Row:
    return Row(
        name,
        compute * out * tokens,
        keeps=compute * wide * tokens,
        weights=(wide + bias) * out,
        flops=2 * wide * out * tokens,
    )


def _convolution(name: str, area: int, wide: int, out: int, before: int, after: int, compute: int) -> Row:
    """A convolution over `area` px with a bias, from `before` places to `after`.

    Its weights' gradient comes channel-last and is copied once more, to their own layout.
    """
    weights = (area * wide + 1) * out
    return Row(
        name,
        compute * out * after,
        keeps=compute * wide * before,
        weights=weights,
        beside=(FLOAT32 - compute) * weights,
        flops=2 * area * wide * out * after,
    )


def _stem(variant: Variant, size: int, batch: int, compute: int) -> Part:
    dim, pixels = variant.dims[0], batch * size * size
    images, tokens = FLOAT32 * 3 * pixels, pixels // STRIDE**2
    if variant.patch_embed == "v1":
        convolution = _convolution("conv", STRIDE**2, 3, dim, pixels, tokens, compute)
        return Part((convolution, *_norm("norm", dim, tokens, compute)), images, is_stem=True)
    half, finer = dim // 2, pixels // 4
    rows = (
        _convolution("conv", 9, 3, half, pixels, finer, compute),
        *_norm("norm", half, finer, compute),
        Row("gelu", FLOAT32 * half * finer, keeps=FLOAT32 * half * finer),
        *_cast("gelu.cast", half * finer, compute),
        _convolution("conv2", 9, half, dim, finer, tokens, compute),
        *_norm("norm2", dim, tokens, compute),
    )
    return Part(rows, images, is_stem=True)


def _downsample(
    variant: Variant, dim: int, out: int, before: int, after: int, residual: int, compute: int
) -> Part:
    size = residual * dim * before
    if variant.downsample == "v1":
        wide = 4 * dim
        merged = (Row("pad", size), Row("merge", residual * wide * after))
        norm = _norm("norm", wide, after, residual, compute)
        return Part((*merged, *norm, _linear("reduction", wide, out, after, compute)), size)
    convolution = _convolution("conv", 9, dim, out, before, after, compute)
    norm = _norm("norm", out, after, compute)
    return Part((*_cast("cast", dim * before, compute, residual), convolution, *norm), size)
