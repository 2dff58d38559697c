"""The Vision Transformer (ViT).

Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021, https://arxiv.org/abs/2010.11929; equation numbers refer to
this paper. Parameters have the same names as in timm and in bubbliiiing's `vit-patch_16.pth`.

Shape comments: B batch, N tokens, C width of the network, H heads, D = C / H width of a head, h and w image size in
pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nets.network import FreezableNetwork, Part


@dataclass(frozen=True)
class Size:
    """Patch side in pixels, width C, number of blocks and attention heads."""

    patch_size: int
    num_features: int
    depth: int
    num_heads: int


# Base, large and huge: table 1 of the ViT paper. Tiny and small: table 1 of DeiT, https://arxiv.org/abs/2012.12877.
# Patch 4 is for images of about 16 to 64 pixels, where a patch of 16 would give too few tokens; vit_xs is vit_t with
# half the blocks. Patch 8: DINO. Patch 14: DINOv2.
SIZES: dict[str, Size] = {
    "vit_xs_4": Size(patch_size=4, num_features=192, depth=6, num_heads=3),
    "vit_t_4": Size(patch_size=4, num_features=192, depth=12, num_heads=3),
    "vit_s_4": Size(patch_size=4, num_features=384, depth=12, num_heads=6),
    "vit_s_8": Size(patch_size=8, num_features=384, depth=12, num_heads=6),
    "vit_b_8": Size(patch_size=8, num_features=768, depth=12, num_heads=12),
    "vit_s_14": Size(patch_size=14, num_features=384, depth=12, num_heads=6),
    "vit_b_14": Size(patch_size=14, num_features=768, depth=12, num_heads=12),
    "vit_l_14": Size(patch_size=14, num_features=1024, depth=24, num_heads=16),
    "vit_t_16": Size(patch_size=16, num_features=192, depth=12, num_heads=3),
    "vit_s_16": Size(patch_size=16, num_features=384, depth=12, num_heads=6),
    "vit_b_16": Size(patch_size=16, num_features=768, depth=12, num_heads=12),
    "vit_l_16": Size(patch_size=16, num_features=1024, depth=24, num_heads=16),
    "vit_b_32": Size(patch_size=32, num_features=768, depth=12, num_heads=12),
    "vit_l_32": Size(patch_size=32, num_features=1024, depth=24, num_heads=16),
    "vit_h_14": Size(patch_size=14, num_features=1280, depth=32, num_heads=16),
}

# bubbliiiing's networks use the tanh approximation of GELU; weights of timm, torchvision and others expect exact GELU.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "gelu": nn.GELU,
}

NORM_EPS = 1e-6
"""Epsilon of the layer norms in the authors' code (torch's default is 1e-5)."""
LAYER_NORM: Callable[[int], nn.Module] = partial(nn.LayerNorm, eps=NORM_EPS)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, drop_rate: float = 0.0) -> Tensor:
    """softmax(q kᵀ · scale) v, with dropout on the weights; q, k, v and the result are (..., N, D)."""
    # For bf16 training on a CPU, two explicit matrix products take at most half the time of torch's fused attention.
    # Recomputing the weights in the backward pass keeps memory at the level of the fused kernel. In fp32, without
    # gradients, and on a GPU the fused kernel is faster: see benchmarks/attention.py.
    if not (q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=drop_rate, scale=scale)
    if q.shape[-2] == 1:  # with one query, the weights are small enough to store
        return explicit_attention(q, k, v, scale, drop_rate)
    # The RNG state must be preserved only if dropout has to repeat the same mask.
    return checkpoint(
        explicit_attention, q, k, v, scale, drop_rate, use_reentrant=False, preserve_rng_state=drop_rate > 0
    )


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, drop_rate: float = 0.0) -> Tensor:
    """`attention` as two matrix products."""
    weights = (q * scale @ k.transpose(-2, -1)).softmax(dim=-1)  # (..., N, N)
    if drop_rate:
        weights = F.dropout(weights, drop_rate)
    return weights @ v


class Attention(nn.Module):
    """Multi-head self-attention (MSA, appendix A) with one linear layer for queries, keys and values."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, attn_drop_rate: float, drop_rate: float) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_features={dim}: must be a multiple of num_heads={num_heads}")
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.attn_drop_rate = attn_drop_rate
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor, num_queries: int | None = None) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, N, C) -> (B, N, 3, H, D)
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))  # each (B, H, N, D)
        if num_queries is not None:
            q = q[:, :, :num_queries]
        x = attention(q, k, v, self.scale, self.attn_drop_rate if self.training else 0.0)
        x = x.transpose(1, 2).flatten(2)  # (B, H, N, D) -> (B, N, C)
        return self.proj_drop(self.proj(x))


class Mlp(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, dim: int, hidden: int, act_layer: Callable[[], nn.Module], drop_rate: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop_rate)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop2 = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))


class DropPath(nn.Module):
    """Residual connection with stochastic depth (Huang et al., 2016, https://arxiv.org/abs/1603.09382).

    In training, the branch is skipped for a random share `drop_rate` of the samples. For the other samples its output
    is divided by 1 - `drop_rate`, which preserves the expectation; evaluation needs no correction.
    """

    def __init__(self, drop_rate: float) -> None:
        super().__init__()
        self.drop_rate = drop_rate

    def forward(self, shortcut: Tensor, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """Return shortcut + branch(x), both (B, N, C); x may have more tokens than its branch returns."""
        if not self.training or self.drop_rate == 0.0:
            return shortcut + branch(x)
        keep_rate = 1.0 - self.drop_rate
        kept = torch.rand(x.shape[0], device=x.device) < keep_rate  # (B,)
        if x.device.type != "cpu":  # selecting the kept samples would synchronize with the GPU
            return shortcut + branch(x) * kept.view(-1, 1, 1) / keep_rate
        if kept.all():
            return shortcut + branch(x) / keep_rate
        rows = kept.nonzero()[:, 0]
        return shortcut.index_add(0, rows, branch(x[rows]).to(shortcut.dtype), alpha=1 / keep_rate)


class Block(nn.Module):
    """Pre-norm encoder block, equations 2 and 3."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        drop_rate: float,
        attn_drop_rate: float,
        drop_path_rate: float,
        norm_layer: Callable[[int], nn.Module],
        act_layer: Callable[[], nn.Module],
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, attn_drop_rate, drop_rate)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer, drop_rate)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor, num_queries: int | None = None) -> Tensor:
        """Map tokens (B, N, C) to tokens of the same shape, or only to the first `num_queries` of them."""
        shortcut = x if num_queries is None else x[:, :num_queries]
        x = self.drop_path(shortcut, x, lambda x: self.attn(self.norm1(x), num_queries))  # z' = MSA(LN(z)) + z
        return self.drop_path(x, x, lambda x: self.mlp(self.norm2(x)))  # z = MLP(LN(z')) + z'


class PatchEmbed(nn.Module):
    """Linear projection of non-overlapping patches, as a convolution whose stride equals its kernel size."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # (B, 3, h, w) -> (B, C, rows, columns) -> (B, N, C)


class VisionTransformer(FreezableNetwork):
    """A Vision Transformer whose backbone can be frozen and thawed.

    Args:
        input_shape: image height and width in pixels, multiples of `patch_size`.
        num_features: width C, a multiple of `num_heads`.
        mlp_ratio: hidden width of the MLP, divided by C.
        drop_rate: dropout after the position embedding, after the attention projection and in the MLP.
        attn_drop_rate: dropout on the attention weights.
        drop_path_rate: stochastic depth rate of the last block; it rises linearly from 0 at the first.
        num_registers: learned tokens between the class token and the patches (Darcet et al., 2024,
            https://arxiv.org/abs/2309.16588); DINOv2 has 4 or none.

    Raises:
        ValueError: `input_shape` or `num_features` is not such a multiple.
    """

    def __init__(
        self,
        input_shape: Sequence[int] = (224, 224),
        patch_size: int = 16,
        num_classes: int = 1000,
        num_features: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.1,
        attn_drop_rate: float = 0.1,
        drop_path_rate: float = 0.1,
        norm_layer: Callable[[int], nn.Module] = LAYER_NORM,
        act_layer: Callable[[], nn.Module] = ACTIVATIONS["gelu_tanh"],
        num_registers: int = 0,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.grid = patch_grid(input_shape, patch_size)
        self.patch_embed = PatchEmbed(patch_size, num_features)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, num_features))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * self.grid[1], num_features))
        self.reg_token = nn.Parameter(torch.zeros(1, num_registers, num_features)) if num_registers else None
        self.num_prefix_tokens = 1 + num_registers
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(
            Block(num_features, num_heads, mlp_ratio, qkv_bias, drop_rate, attn_drop_rate, rate, norm_layer, act_layer)
            for rate in torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        )
        self.norm = norm_layer(num_features)
        self.head = nn.Linear(num_features, num_classes)

        for tokens in (self.cls_token, self.pos_embed, self.reg_token):
            if tokens is not None:
                nn.init.trunc_normal_(tokens, std=0.02)
        self.apply(_init_weights)

    def resize(self, input_shape: Sequence[int]) -> None:
        """Resample the position embedding for another input shape."""
        resized = self.resize_state({"pos_embed": self.pos_embed.data}, input_shape)
        self.pos_embed.data = resized["pos_embed"]
        self.grid = patch_grid(input_shape, self.patch_size)
        super().resize(input_shape)

    def resize_state(self, state: dict[str, Tensor], input_shape: Sequence[int]) -> dict[str, Tensor]:
        """Return `state` with its position embedding resampled for another input shape."""
        grid = patch_grid(input_shape, self.patch_size)
        return state | {"pos_embed": resample_pos_embed(state["pos_embed"], self.grid, grid)}

    def resample_positions(self, pos_embed: Tensor, source: tuple[int, int], **options: bool) -> Tensor:
        """Return a position embedding resampled from the grid `source` to the grid of this network."""
        return resample_pos_embed(pos_embed, source, self.grid, **options)

    def embed(self, x: Tensor) -> Tensor:
        """Map images (B, 3, h, w) to tokens (B, N, C), equation 1: class token, registers, patches."""
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        if self.reg_token is not None:
            x = torch.cat([x[:, :1], self.reg_token.expand(x.shape[0], -1, -1), x[:, 1:]], dim=1)
        return self.pos_drop(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (B, 3, h, w) to normalized tokens (B, N, C), the class token first."""
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward_head(self, x: Tensor) -> Tensor:
        """Map tokens (B, N, C) to logits (B, classes), from the class token (equation 4)."""
        return self.head(x[:, 0])

    def parts(self) -> list[Part]:
        """Return embedding, blocks and norm.

        The head reads only the class token, so the last block computes only that token (N = 1) and the norm returns
        (B, C).
        """
        *blocks, last = self.blocks
        embeddings = (self.patch_embed, self.pos_drop, self.cls_token, self.pos_embed, self.reg_token)
        return [
            Part(self.embed, tuple(part for part in embeddings if part is not None)),
            *(Part(block, (block,)) for block in blocks),
            Part(partial(last, num_queries=1), (last,)),
            Part(lambda x: self.norm(x)[:, 0], (self.norm,)),
        ]

    @property
    def feature_map_layer(self) -> nn.Module:
        """The last module whose output covers all patches."""
        return self.blocks[-1].norm1

    def to_feature_map(self, x: Tensor) -> Tensor:
        """Reshape tokens (B, N, C) to a feature map (B, C, rows, columns) of the patches."""
        return x[:, self.num_prefix_tokens :].transpose(1, 2).unflatten(2, self.grid)


def vit(
    input_shape: Sequence[int] = (224, 224),
    pretrained: bool = False,
    num_classes: int = 1000,
    *,
    name: str = "vit_b_16",
    activation: str = "gelu_tanh",
    norm_eps: float = NORM_EPS,
    num_registers: int = 0,
    drop_rate: float = 0.1,
    attn_drop_rate: float = 0.1,
    drop_path_rate: float = 0.1,
) -> VisionTransformer:
    """Build a ViT of one of the `SIZES`. The first three arguments are those of `classification-pytorch`.

    With `pretrained`, published weights are loaded (see `nets.weights.pretrained.find_pretrained`). They determine
    `activation`, `norm_eps` and `num_registers`; their head is used if it has `num_classes` outputs.

    >>> vit(input_shape=[224, 224], num_classes=12).head.out_features
    12
    """
    variant = {"activation": activation, "norm_eps": norm_eps, "num_registers": num_registers}
    if pretrained:
        from nets.weights import load  # imported here to keep this file independent of `nets.weights`
        from nets.weights import pretrained as published

        weights = load.read_weights(published.find_pretrained(name))
        variant |= weights.variant
    model = VisionTransformer(
        input_shape,
        num_classes=num_classes,
        drop_rate=drop_rate,
        attn_drop_rate=attn_drop_rate,
        drop_path_rate=drop_path_rate,
        norm_layer=partial(nn.LayerNorm, eps=variant["norm_eps"]),
        act_layer=ACTIVATIONS[variant["activation"]],
        num_registers=variant["num_registers"],
        **vars(SIZES[name]),
    )
    if pretrained:
        load.load_weights(model, weights)
    model.arguments = {"name": name, "num_classes": num_classes, "input_shape": list(input_shape)} | variant
    return model


def resample_pos_embed(pos_embed: Tensor, source: tuple[int, int], target: tuple[int, int], **options: bool) -> Tensor:
    """Resample a position embedding (1, 1 + rows * columns, C) from the patch grid `source` to `target` (section 3.2).

    The class token's entry is unchanged. `options`, which differ between projects, are passed to `F.interpolate`.
    """
    class_token, patches = pos_embed[:, :1], pos_embed[:, 1:]
    patches = patches.unflatten(1, source).permute(0, 3, 1, 2)  # (1, N, C) -> (1, C, rows, columns)
    patches = F.interpolate(patches.float(), size=target, mode="bicubic", **options).to(pos_embed.dtype)
    return torch.cat([class_token, patches.flatten(2).transpose(1, 2)], dim=1)


def patch_grid(input_shape: Sequence[int], patch_size: int) -> tuple[int, int]:
    """Return the number of patch rows and columns.

    Raises:
        ValueError: a side is not a multiple of the patch size; the message suggests the nearest valid shape.
    """
    if len(input_shape) != 2 or any(side < 1 or side % patch_size for side in input_shape):
        nearest = tuple(max(patch_size, round(side / patch_size) * patch_size) for side in input_shape[:2])
        raise ValueError(
            f"input_shape={tuple(input_shape)}: height and width must be multiples of the patch size, {patch_size} "
            f"pixels; the nearest valid shape is {nearest}"
        )
    return input_shape[0] // patch_size, input_shape[1] // patch_size


def _init_weights(module: nn.Module) -> None:
    """Initialize as timm and DeiT do: truncated normal with std 0.02, zero biases. Norms keep ones and zeros."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
