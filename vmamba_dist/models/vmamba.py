"""VMamba: patch embedding, stages of scan blocks, classifier; with timm's feature API.

Law: the model knows nothing of parallelism, draws no randomness when it is given drop-path masks, and keeps
no buffers. Parameter names are the official ones; tokens are channel-last (B, H, W, C) inside, images
(B, 3, H, W) outside. A stage's feature is its blocks' output, before the downsample that follows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vmamba_dist.models import fused
from vmamba_dist.models.init import init_parameters
from vmamba_dist.models.ss2d import (
    LN_EPS,
    SS2D,
    LayerNorm,
    ScanBackend,
    ScanPattern,
    to_channels_first,
    to_channels_last,
)
from vmamba_dist.models.variants import STRIDE, Variant, check_image_size, get_variant
from vmamba_kernels.backend import backend_for

_NOT_DECAYED = re.compile(r"\.(A_logs|Ds|dt_projs_bias)$")


class PatchMerging(nn.Module):
    """Swin's downsample: join each 2x2 of tokens; (B, H, W, C) → (B, ⌈H/2⌉, ⌈W/2⌉, out)."""

    def __init__(self, dim: int, out_dim: int, backend: ScanBackend = "auto") -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False)
        self.norm = LayerNorm(4 * dim, backend)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        parts = (x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2])
        merged: Tensor = self.reduction(self.norm(torch.cat(parts, dim=-1)))
        return merged


Branches = Callable[[Tensor, Tensor | None], Tensor]  # a block's arithmetic: (x, keep) → x
Recompute = Callable[[Branches, Tensor, Tensor | None], Tensor]


def recompute_block(branches: Branches, x: Tensor, keep: Tensor | None) -> Tensor:
    """Run a block, or the stem, and keep its input alone; the backward runs it again."""
    # Nothing is drawn at random in them: the generators' state need not be kept.
    out: Tensor = checkpoint(branches, x, keep, use_reentrant=False, preserve_rng_state=False)
    return out


class PatchEmbed(nn.Sequential):
    """The stem: images (B, 3, H, W) → tokens (B, H/4, W/4, dim). The indices of its parts are official names.

    `recompute` is as a block's, and called inside forward for the same reasons; a stem has no `keep`.
    """

    recompute: Recompute | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute is not None and torch.is_grad_enabled():
            return self.recompute(self._embed, x, None)
        return self._embed(x)

    def _embed(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        # The layout is changed here: a recomputed stem keeps the images that are there anyway, and no copy of them.
        embed = super().forward
        out: Tensor = embed(x.contiguous(memory_format=torch.channels_last))  # type: ignore[no-untyped-call]
        return out


def _patch_embed(kind: Literal["v1", "v2"], dim: int, backend: ScanBackend) -> PatchEmbed:
    if kind == "v1":
        return PatchEmbed(nn.Conv2d(3, dim, STRIDE, STRIDE), to_channels_last(), LayerNorm(dim, backend))
    half = dim // 2
    return PatchEmbed(
        nn.Conv2d(3, half, kernel_size=3, stride=2, padding=1),
        to_channels_last(),
        LayerNorm(half, backend),
        to_channels_first(),
        nn.GELU(),
        nn.Conv2d(half, dim, kernel_size=3, stride=2, padding=1),
        to_channels_last(),
        LayerNorm(dim, backend),
    )


class _HalvingConv(nn.Conv2d):
    """A 3x3 convolution of stride 2, (B, dim, H, W) → (B, out_dim, ⌈H/2⌉, ⌈W/2⌉).

    Of a single column the stride along it is of no consequence, and 1 is taken: with 2, oneDNN leaves bfloat16
    gradients of the weights that see padding alone unwritten (torch 2.14 on a CPU).
    """

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__(dim, out_dim, kernel_size=3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[3] == 1:
            return F.conv2d(x, self.weight, self.bias, stride=(2, 1), padding=1)
        return super().forward(x)


def _downsample(kind: Literal["v1", "v3"], dim: int, out_dim: int, backend: ScanBackend) -> nn.Module:
    """(B, H, W, dim) → (B, ⌈H/2⌉, ⌈W/2⌉, out_dim). The indices of the parts are official names."""
    if kind == "v1":
        return PatchMerging(dim, out_dim, backend)
    conv = _HalvingConv(dim, out_dim)
    return nn.Sequential(to_channels_first(), conv, to_channels_last(), LayerNorm(out_dim, backend))


class Mlp(nn.Module):
    """Two linears with a GELU between, over the last dim."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """Pre-norm residual block on (B, H, W, C): SS2D, then an MLP where the variant has one.

    `recompute` runs the block's arithmetic in training in its own way; None runs it as it stands. It is called inside
    forward, so that a compiled block holds it and a sharded one gathers its weights once for it and the backward.
    `fuse`: auto computes a plain block on CUDA as one autograd node (models/fused.py), wherever that is possible; never
    composes its modules; always fuses on every device.
    """

    recompute: Recompute | None
    fuse: Literal["auto", "never", "always"]

    def __init__(self, dim: int, variant: Variant, pattern: ScanPattern, backend: ScanBackend) -> None:
        super().__init__()
        self.norm = LayerNorm(dim, backend)
        self.op = SS2D(
            dim,
            ssm_ratio=variant.ssm_ratio,
            d_state=variant.d_state,
            gate=variant.gate,
            conv_bias=variant.conv_bias,
            scan_pattern=pattern,
            scan_backend=backend,
        )
        self.recompute = None
        self.fuse = "auto"
        self.has_mlp = variant.mlp_ratio > 0
        if self.has_mlp:
            self.norm2 = LayerNorm(dim, backend)
            self.mlp = Mlp(dim, variant.hidden(dim))

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """`keep` (B, 2) scales the SSM and the MLP branch of each sample; None keeps both."""
        if self.recompute is not None and torch.is_grad_enabled():
            return self.recompute(self._branches, x, keep)
        return self._branches(x, keep)

    def _branches(self, x: Tensor, keep: Tensor | None) -> Tensor:
        if self._fuses(x, keep):
            backend = backend_for(self.op.scan_backend, x)
            plan = fused.Plan(LN_EPS, self.op.scan_pattern, backend)
            return fused.run(x, keep, plan, fused.weights_of(self))
        x = x + _kept(self.op(self.norm(x)), keep, 0)
        if self.has_mlp:
            x = x + _kept(self.mlp(self.norm2(x)), keep, 1)
        return x

    def _fuses(self, x: Tensor, keep: Tensor | None) -> bool:
        """Whether one node may stand for the modules: nobody has replaced or reset one, or listens to it."""
        if self.fuse == "never" or (self.fuse == "auto" and not x.is_cuda) or torch.compiler.is_compiling():
            return False
        if not self.has_mlp or type(self.mlp) is not Mlp or type(self.op) is not SS2D:
            return False
        if self.op.gate or self.op.scan_pattern == "cascade" or x.numel() == 0:
            return False
        if x.is_cuda and self.op.scan_backend == "torch":  # whoever asks for that wants no kernel of ours
            return False
        if keep is not None and keep.requires_grad:  # the node gives it no gradient
            return False
        parts = [(self.mlp, Mlp), *fused.parts_of(self)]
        if not all(type(part) is kind and not _listened_to(part) for part, kind in parts):
            return False
        return fused.has_plain_settings(self)


def _listened_to(part: nn.Module) -> bool:
    """Whether it has hooks, or a forward of its own, as some libraries wrap one."""
    return bool(
        part._forward_hooks
        or part._forward_pre_hooks
        or part._backward_hooks
        or part._backward_pre_hooks
        or "forward" in part.__dict__
    )


def _kept(branch: Tensor, keep: Tensor | None, column: int) -> Tensor:
    if keep is None:
        return branch
    # The product in the mask's float32: 1/keep_prob rounded to bfloat16 would bias every branch.
    return (branch * keep[:, column].view(-1, 1, 1, 1)).to(branch.dtype)


class Stage(nn.Module):
    """The blocks of one stage, and the downsample to the next."""

    def __init__(self, blocks: list[Block], downsample: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


class Classifier(nn.Module):
    """Norm at each position, then the pool, then the head."""

    def __init__(self, dim: int, num_classes: int, backend: ScanBackend) -> None:
        super().__init__()
        self.norm = LayerNorm(dim, backend)
        self.head = _head(dim, num_classes)


def _head(dim: int, num_classes: int) -> nn.Linear | nn.Identity:
    if num_classes < 0:
        raise ValueError(f"num_classes={num_classes}: use 0 for no head, or the number of classes")
    return nn.Linear(dim, num_classes) if num_classes else nn.Identity()


class VMamba(nn.Module):
    """A VMamba backbone with its classifier.

    Built under `torch.device("meta")` it holds no values: call `to_empty(device=…)`, then
    `init_weights(seed)`. Built otherwise it draws the seed from torch's global generator.
    """

    output_fmt = "NHWC"  # of forward_features, as timm names it

    def __init__(
        self,
        variant: Variant,
        *,
        num_classes: int = 1000,
        global_pool: str = "avg",
        scan_pattern: ScanPattern = "cross2d",
        scan_backend: ScanBackend = "auto",
    ) -> None:
        super().__init__()
        self.variant = variant
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = variant.dims[-1]
        self.global_pool = _checked_pool(global_pool)
        last = max(variant.num_blocks - 1, 1)
        self.drop_path_rates = [variant.drop_path_rate * i / last for i in range(variant.num_blocks)]
        self.feature_info = [
            {"num_chs": dim, "reduction": STRIDE << stage, "module": f"layers.{stage}.blocks"}
            for stage, dim in enumerate(variant.dims)
        ]
        # Parts are made without values: each tensor is then filled once, by its name.
        device = torch.get_default_device()
        with torch.device("meta"):
            self.patch_embed = _patch_embed(variant.patch_embed, variant.dims[0], scan_backend)
            self.layers = nn.ModuleList(
                Stage(
                    [Block(dim, variant, scan_pattern, scan_backend) for _ in range(depth)],
                    _downsample(variant.downsample, dim, following, scan_backend)
                    if following
                    else nn.Identity(),
                )
                for dim, following, depth in zip(
                    variant.dims, (*variant.dims[1:], 0), variant.depths, strict=True
                )
            )
            self.classifier = Classifier(variant.dims[-1], num_classes, scan_backend)
        if device.type != "meta":
            self.to_empty(device=device)
            self.init_weights()

    @property
    def num_blocks(self) -> int:
        return self.variant.num_blocks

    def init_weights(self, seed: int | None = None) -> None:
        """Fill every parameter from (its name, seed); None draws the seed from torch's global generator."""
        init_parameters(self, _global_seed() if seed is None else seed)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Classify (B, 3, H, W) images, H and W multiples of 4 → (B, num_classes).

        `keep` (B, 2·num_blocks) multiplies the residual branches, column 2i the SSM and 2i+1 the MLP of block
        i; its values are 0 or 1/keep_prob. None draws them in training from torch's global generator.
        """
        return self.forward_head(self.forward_features(x, keep))

    def forward_features(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Return the normalised tokens of the last stage, (B, H/32, W/32, num_features), sizes rounded up."""
        tokens: Tensor = self.classifier.norm(self._stages(x, keep, len(self.layers))[-1])
        return tokens

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool the tokens of `forward_features`, and classify unless `pre_logits`."""
        if self.global_pool == "avg":
            x = x.mean(dim=(1, 2))
        return x if pre_logits else self.classifier.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        keep: Tensor | None = None,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the features of the stages at `indices`, and the final tokens unless `intermediates_only`.

        `indices`: stages, negative from the end; a number n is the last n; None all. `norm` normalises the
        last stage's, which alone has a norm. `stop_early` runs no stage after the last one asked for, and the
        final tokens are then that stage's.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt={output_fmt!r}: use NCHW or NHWC")
        chosen = self._stage_indices(indices)
        outputs = self._stages(x, keep, max(chosen) + 1 if stop_early else len(self.layers))
        final = outputs[-1]
        if len(outputs) == len(self.layers):
            final = self.classifier.norm(final)
            if norm:
                outputs[-1] = final
        features = [outputs[i] for i in sorted(set(chosen))]
        if output_fmt == "NCHW":
            features = [f.permute(0, 3, 1, 2).contiguous() for f in features]
        return features if intermediates_only else (final, features)

    def get_intermediate_layers(
        self, x: Tensor, n: int | Sequence[int] = 1, reshape: bool = False, norm: bool = True
    ) -> tuple[Tensor, ...]:
        """Return the tokens (B, H·W, C) of the last `n` stages, or of those listed; `reshape`: (B, C, H, W).

        The signature is DINOv2's. `norm` normalises the last stage's, which alone has a norm.
        """
        features = self.forward_intermediates(
            x, n, norm=norm, stop_early=True, output_fmt="NHWC", intermediates_only=True
        )
        assert isinstance(features, list)
        if reshape:
            return tuple(f.permute(0, 3, 1, 2).contiguous() for f in features)
        return tuple(f.flatten(1, 2) for f in features)

    def _stages(self, x: Tensor, keep: Tensor | None, num_stages: int) -> list[Tensor]:
        """Run the first stages on images; return each one's tokens."""
        if x.dim() != 4 or x.shape[1] != 3:
            raise ValueError(f"input of shape {tuple(x.shape)}: give images (B, 3, H, W)")
        check_image_size(x.shape[2], x.shape[3])
        if keep is None:
            keep = self._draw_keep(x)
        elif keep.shape != (x.shape[0], 2 * self.num_blocks):
            wanted = (x.shape[0], 2 * self.num_blocks)
            raise ValueError(f"keep of shape {tuple(keep.shape)}: give (B, 2 * blocks) = {wanted}")
        x = self.patch_embed(x)
        outputs: list[Tensor] = []
        first = 0
        for stage in self._stage_list()[:num_stages]:
            for i, block in enumerate(stage.blocks, start=first):
                mask = None if keep is None else keep[:, 2 * i : 2 * i + 2]
                x = block(x, mask)
            first += len(stage.blocks)
            outputs.append(x)
            if len(outputs) < num_stages:
                x = stage.downsample(x)
        return outputs

    def _stage_list(self) -> list[Stage]:
        return [stage for stage in self.layers if isinstance(stage, Stage)]

    def blocks(self) -> Iterator[Block]:
        """Yield the blocks in order: what is recomputed, compiled and sharded as one."""
        for stage in self._stage_list():
            for block in stage.blocks:
                assert isinstance(block, Block)
                yield block

    def _draw_keep(self, x: Tensor) -> Tensor | None:
        if not self.training or self.variant.drop_path_rate == 0:
            return None
        prob = 1 - torch.tensor(self.drop_path_rates, device=x.device).repeat_interleave(2)
        return torch.bernoulli(prob.expand(x.shape[0], -1)) / prob

    def _stage_indices(self, indices: int | Sequence[int] | None) -> list[int]:
        count = len(self.layers)
        if indices is None:
            return list(range(count))
        if isinstance(indices, int):
            if not 1 <= indices <= count:
                raise ValueError(f"indices={indices}: the model has {count} stages; use 1 … {count}")
            return list(range(count - indices, count))
        if not indices or any(not -count <= i < count for i in indices):
            raise ValueError(
                f"indices={list(indices)}: give stages 0 … {count - 1}, or negative from the end"
            )
        return [i % count for i in indices]

    def get_classifier(self) -> nn.Linear | nn.Identity:
        """Return the head; Identity where num_classes is 0."""
        return self.classifier.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a fresh one, on the device and in the dtype of the norm before it."""
        if global_pool is not None:
            self.global_pool = _checked_pool(global_pool)
        like = self.classifier.norm.weight
        with torch.device("meta"):
            head = _head(self.num_features, num_classes)
        head.to_empty(device=like.device).to(like.dtype)
        if not like.is_meta:
            init_parameters(head, _global_seed(), prefix="classifier.head.")
        self.classifier.head = head
        self.num_classes = num_classes

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the stem and each block in the backward instead of keeping their activations."""
        self.patch_embed.recompute = recompute_block if enable else None
        for block in self.blocks():
            block.recompute = recompute_block if enable else None

    @property
    def grad_checkpointing(self) -> bool:
        """Whether blocks are recomputed in the backward, wholly or in part."""
        return any(block.recompute is not None for block in self.blocks())

    def no_weight_decay(self) -> set[str]:
        """Return the names of the recurrence's parameters, which Mamba's authors exempt from weight decay."""
        return {name for name, _ in self.named_parameters() if _NOT_DECAYED.search(name)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's patterns of parameter groups from input to output: by block, `coarse` by stage."""
        by_block = [(r"^layers\.(\d+)\.blocks\.(\d+)", None), (r"^layers\.(\d+)\.downsample", (99999,))]
        return {"stem": r"^patch_embed", "blocks": r"^layers\.(\d+)" if coarse else by_block}


def _checked_pool(global_pool: str) -> str:
    if global_pool not in ("avg", ""):
        raise ValueError(f"global_pool={global_pool!r}: use 'avg', or '' for none")
    return global_pool


def _global_seed() -> int:
    return int(torch.randint(2**62, (), device="cpu"))


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    drop_path_rate: float | None = None,
    scan_pattern: ScanPattern = "cross2d",
    scan_backend: ScanBackend = "auto",
    **overrides: Any,
) -> VMamba:
    """Build a model of `list_models()`; `overrides` replace fields of its `Variant`.

    `drop_path_rate` None is the variant's own. Raises ValueError naming an unknown name or option.
    """
    if drop_path_rate is not None:
        overrides["drop_path_rate"] = drop_path_rate
    return VMamba(
        get_variant(name, **overrides),
        num_classes=num_classes,
        scan_pattern=scan_pattern,
        scan_backend=scan_backend,
    )
