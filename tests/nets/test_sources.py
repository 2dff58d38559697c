"""nets/weights/sources.py: each project's network with random weights, against ours with the same weights."""

import argparse
import math
import os
import zipfile
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nets.factory import build_model
from nets.weights.load import load_weights, read_weights

SIDE = 64


class Peer(NamedTuple):
    """A project's network.

    Attributes:
        file: its saved weights.
        backbone: our name of the network.
        logits: maps images of any size to logits, or without a head to class token features (B, C).
        has_head: whether `logits` returns logits.
    """

    file: str
    backbone: str
    logits: Callable[[Tensor], Tensor]
    has_head: bool = True


def randomise(network: nn.Module) -> nn.Module:
    """Draw random weights without zeros or ones, and with large position embeddings."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        scale = 0.3 if parameter.ndim == 1 else 0.5 / math.sqrt(parameter[0].numel())
        noise = torch.randn(parameter.shape, generator=generator) * (0.5 if "pos" in name else scale)
        one = parameter.ndim == 1 and ("norm" in name or "ln" in name) and name.endswith("weight")
        parameter.data.copy_(noise + (1 if one or "gamma" in name or "lambda" in name else 0))
    return network.eval()


def of_timm(name: str, backbone: str, file: str, has_head: bool = True, wrap: Callable = dict, **options) -> Peer:
    peer = randomise(timm.create_model(name, img_size=SIDE - SIDE % 14 if "14" in name else SIDE, **options))
    state = peer.state_dict()
    save_file(state, file) if file.endswith(".safetensors") else torch.save(wrap(state), file)

    def logits(x: Tensor) -> Tensor:
        other = timm.create_model(name, img_size=tuple(x.shape[-2:]), **options).eval()
        resampled = timm.models.vision_transformer.checkpoint_filter_fn(dict(state), other)
        other.load_state_dict(resampled)
        return other(x)

    return Peer(file, backbone, logits, has_head)


def of_torchvision() -> Peer:
    peer = randomise(torchvision.models.VisionTransformer(SIDE, 16, 12, 3, 192, 768, num_classes=5))
    torch.save(peer.state_dict(), "torchvision.pth")

    def logits(x: Tensor) -> Tensor:
        side = x.shape[-1]
        state = torchvision.models.vision_transformer.interpolate_embeddings(side, 16, peer.state_dict())
        other = torchvision.models.VisionTransformer(side, 16, 12, 3, 192, 768, num_classes=5).eval()
        other.load_state_dict(state)
        return other(x)

    return Peer("torchvision.pth", "vit_t_16", logits)


def of_torchvision_as_published() -> Peer:
    """Published files have names of an earlier version for the layers of the MLP."""
    peer = of_torchvision()
    state = torch.load(peer.file, weights_only=True)
    old = {n.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): t for n, t in state.items()}
    torch.save(old, peer.file)
    return peer


HF_SIZES = {"hidden_size": 192, "num_attention_heads": 3, "image_size": SIDE, "num_hidden_layers": 12}


def of_hugging_face_vit(in_memory: bool = False, model: bool = False) -> Peer:
    config = transformers.ViTConfig(**HF_SIZES, intermediate_size=768, num_labels=5, hidden_act="gelu")
    kind = transformers.ViTModel if model else transformers.ViTForImageClassification
    peer = randomise(kind(config))
    if in_memory:
        torch.save(peer.state_dict(), "in_memory.bin")
    else:
        peer.save_pretrained("hf")

    def logits(x: Tensor) -> Tensor:
        found = peer(x, interpolate_pos_encoding=True)
        return found.last_hidden_state[:, 0] if model else found.logits

    return Peer("in_memory.bin" if in_memory else "hf/model.safetensors", "vit_t_16", logits, not model)


def of_hugging_face_dinov2(registers: bool = False) -> Peer:
    sizes = HF_SIZES | {"hidden_size": 384, "num_attention_heads": 6, "image_size": 56, "patch_size": 14}
    if registers:
        config = transformers.Dinov2WithRegistersConfig(**sizes, num_register_tokens=4)
        peer = randomise(transformers.Dinov2WithRegistersModel(config))
    else:
        peer = randomise(transformers.Dinov2Model(transformers.Dinov2Config(**sizes)))
    peer.save_pretrained("hf")
    return Peer("hf/model.safetensors", "vit_s_14", lambda x: peer(x).last_hidden_state[:, 0], has_head=False)


def of_mae() -> Peer:
    """A pretrained encoder with its decoder."""
    decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(8, 192)}
    decoder |= {"decoder_blocks.0.norm1.weight": torch.zeros(8), "decoder_pred.bias": torch.zeros(8)}

    def wrap(state: dict[str, Tensor]) -> dict:
        return {"model": state | decoder, "epoch": 800, "args": argparse.Namespace(lr=1e-3, model="mae")}

    return without_antialias(of_timm("vit_tiny_patch16_224", "vit_t_16", "mae.pth", False, wrap, num_classes=0))


def of_dino() -> Peer:
    """A full checkpoint: student and teacher, each with prefixes and the pretraining head."""

    def wrap(state: dict[str, Tensor]) -> dict:
        backbone = {f"module.backbone.{name}": tensor for name, tensor in state.items()}
        head = {"module.head.mlp.0.weight": torch.zeros(3, 192), "module.head.last_layer.weight_v": torch.zeros(3, 3)}
        student = {name: torch.zeros_like(tensor) for name, tensor in (backbone | head).items()}
        return {"student": student, "teacher": backbone | head, "epoch": 100, "args": argparse.Namespace(arch="x")}

    return without_antialias(of_timm("vit_tiny_patch16_224", "vit_t_16", "dino.pth", False, wrap, num_classes=0))


def without_antialias(peer: Peer) -> Peer:
    """Resample as in Meta's projects: like timm, but without antialiasing."""
    own = timm.models.vision_transformer.resample_abs_pos_embed

    def logits(x: Tensor) -> Tensor:
        def resample(*args, **options):
            return own(*args, **options | {"antialias": False})

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(timm.models.vision_transformer, "resample_abs_pos_embed", resample)
            return peer.logits(x)

    return peer._replace(logits=logits)


def of_google(prefix: str = "") -> Peer:
    """Arrays in flax's layout, and a forward pass written from the published layout."""
    generator = np.random.default_rng(0)
    c, heads, patch = 192, 3, 16

    def draw(*shape: int, mean: float = 0.0) -> np.ndarray:
        fan_in = math.prod(shape[:-1]) if len(shape) != 3 else c
        return (mean + generator.normal(size=shape) * (0.1 if len(shape) < 2 else fan_in**-0.5)).astype(np.float32)

    p = {"cls": draw(1, 1, c), "embedding/kernel": draw(patch, patch, 3, c), "embedding/bias": draw(c)}
    p["Transformer/posembed_input/pos_embedding"] = generator.normal(size=(1, 17, c)).astype(np.float32)
    for n in range(12):
        block = f"Transformer/encoderblock_{n}/"
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            p |= {block + norm + "/scale": draw(c, mean=1.0), block + norm + "/bias": draw(c)}
        attention = block + "MultiHeadDotProductAttention_1/"
        for part in ("query", "key", "value"):
            p |= {
                f"{attention}{part}/kernel": draw(c, heads, c // heads),
                f"{attention}{part}/bias": draw(heads, c // heads),
            }
        p |= {attention + "out/kernel": draw(heads, c // heads, c), attention + "out/bias": draw(c)}
        p |= {block + "MlpBlock_3/Dense_0/kernel": draw(c, 4 * c), block + "MlpBlock_3/Dense_0/bias": draw(4 * c)}
        p |= {block + "MlpBlock_3/Dense_1/kernel": draw(4 * c, c), block + "MlpBlock_3/Dense_1/bias": draw(c)}
    p |= {"Transformer/encoder_norm/scale": draw(c, mean=1.0), "Transformer/encoder_norm/bias": draw(c)}
    p |= {"head/kernel": draw(c, 5), "head/bias": draw(5)}
    np.savez("google.npz", **{prefix + name: array for name, array in p.items()})
    w = {name: torch.from_numpy(array) for name, array in p.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (c,), w[name + "/scale"], w[name + "/bias"], eps=1e-6)

    def dense(x: Tensor, name: str) -> Tensor:
        return x @ w[name + "/kernel"] + w[name + "/bias"]

    def logits(x: Tensor) -> Tensor:
        side = x.shape[-1] // patch
        patches = x.unflatten(2, (-1, patch)).unflatten(4, (-1, patch))  # (B, 3, rows, patch, columns, patch)
        patches = torch.einsum("bcipjq,pqcd->bijd", patches, w["embedding/kernel"]) + w["embedding/bias"]
        x = torch.cat([w["cls"].expand(len(x), -1, -1), patches.flatten(1, 2)], dim=1)
        positions = w["Transformer/posembed_input/pos_embedding"]
        if side != 4:
            grid = positions[:, 1:].reshape(1, 4, 4, c).permute(0, 3, 1, 2)
            grid = F.interpolate(grid, (side, side), mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)
            positions = torch.cat([positions[:, :1], grid], dim=1)
        x = x + positions
        for n in range(12):
            block = f"Transformer/encoderblock_{n}/"
            attention = block + "MultiHeadDotProductAttention_1/"
            y = norm(x, block + "LayerNorm_0")
            q, k, v = (
                torch.einsum("bnc,chd->bnhd", y, w[f"{attention}{part}/kernel"]) + w[f"{attention}{part}/bias"]
                for part in ("query", "key", "value")
            )
            scores = torch.einsum("bqhd,bkhd->bhqk", q / math.sqrt(c // heads), k).softmax(dim=-1)
            y = torch.einsum("bhqk,bkhd->bqhd", scores, v)
            x = x + torch.einsum("bqhd,hdc->bqc", y, w[attention + "out/kernel"]) + w[attention + "out/bias"]
            y = F.gelu(dense(norm(x, block + "LayerNorm_2"), block + "MlpBlock_3/Dense_0"), approximate="tanh")
            x = x + dense(y, block + "MlpBlock_3/Dense_1")
        return dense(norm(x, "Transformer/encoder_norm")[:, 0], "head")

    return Peer("google.npz", "vit_t_16", logits)


PEERS = {
    "timm, safetensors": lambda: of_timm("vit_tiny_patch16_224", "vit_t_16", "w.safetensors", num_classes=5),
    "timm, DeiT, .bin": lambda: of_timm("deit_tiny_patch16_224", "vit_t_16", "w.bin", num_classes=5),
    "timm, training checkpoint": lambda: of_timm(
        "vit_tiny_patch16_224", "vit_t_16", "w.pth", wrap=lambda s: {"state_dict": s, "arch": "x"}, num_classes=5
    ),
    "timm, DINOv2": lambda: of_timm("vit_small_patch14_dinov2", "vit_s_14", "w.pth", num_classes=5),
    "timm, DINOv2 with registers": lambda: of_timm("vit_small_patch14_reg4_dinov2", "vit_s_14", "w.pth", num_classes=5),
    "timm, DeiT III without class position": lambda: of_timm(
        "deit3_small_patch16_224", "vit_s_16", "w.pth", num_classes=5
    ),
    "torchvision": of_torchvision,
    "torchvision, as published": of_torchvision_as_published,
    "Hugging Face, ViT": of_hugging_face_vit,
    "Hugging Face, ViT in memory": lambda: of_hugging_face_vit(in_memory=True),
    "Hugging Face, ViT without head": lambda: of_hugging_face_vit(model=True),
    "Hugging Face, DINOv2": of_hugging_face_dinov2,
    "Hugging Face, DINOv2 with registers": lambda: of_hugging_face_dinov2(registers=True),
    "Google": of_google,
    "Google, AugReg": lambda: of_google("opt/target/"),
    "MAE": of_mae,
    "DINO": of_dino,
}


@pytest.mark.parametrize("name", PEERS)
def test_outputs_equal_the_projects_network(here, capsys, name):
    """At its own input size, and at another with the project's own resampling."""
    torch.manual_seed(0)
    peer = PEERS[name]()
    weights = read_weights(peer.file)
    patch = weights.state["patch_embed.proj.weight"].shape[-1]
    differences = []
    for resized in (False, True):
        side = patch * (weights.grid()[0] + 2 * resized)
        own = build_model(peer.backbone, 5, (side, side), **weights.variant).eval()
        load_weights(own, weights)
        assert ("resampled" in capsys.readouterr().out) == resized
        images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            found = own(images) if peer.has_head else own.forward_embedding(images)
            expected = peer.logits(images)
        assert expected.std() > 0.1
        differences.append((found - expected).abs().max().item())
    print(f"{name}: {max(differences):.1e}")
    assert max(differences) < 1e-4


FOREIGN = {
    "pre_logits.fc.weight": "pre-logits",
    "dist_token": "distilled DeiT",
    "fc_norm.weight": "mean of all tokens",
    "blocks.0.attn.q_norm.weight": "norms of queries",
    "blocks.0.mlp.w12.weight": "SwiGLU",
    "norm_pre.weight": "CLIP",
    "blocks.0.gamma_1": "BEiT",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_parts_are_an_error(here, name):
    state = build_model("vit_xs_4", 2, (8, 8)).state_dict()
    torch.save(state | {name: torch.zeros(1)}, "w.pth")
    with pytest.raises(ValueError, match=rf"w\.pth can't be used: it has .*{FOREIGN[name]}.*'{name}'"):
        read_weights("w.pth")


def test_pre_logits_of_google_are_an_error(here):
    of_google()
    arrays = dict(np.load("google.npz")) | {"pre_logits/kernel": np.zeros((192, 192), np.float32)}
    np.savez("w.npz", **arrays)
    with pytest.raises(ValueError, match=r"pre-logits\), 'pre_logits/kernel'"):
        read_weights("w.npz")


def test_distilled_deit_is_an_error(here):
    torch.save(timm.create_model("deit_tiny_distilled_patch16_224").state_dict(), "w.pth")
    with pytest.raises(ValueError, match="distilled DeiT"):
        read_weights("w.pth")


def test_excluded_tensors_are_listed(here, capsys):
    peer = of_dino()
    load_weights(build_model("vit_t_16", 5, (SIDE, SIDE)), read_weights(peer.file))
    output = capsys.readouterr().out
    assert (
        "2 tensors that a classifier doesn't need are excluded: head.mlp.0.weight, head.last_layer.weight_v" in output
    )
    assert "Meta's MAE, DINO or DeiT" in output


def test_missing_tensors_are_listed(here):
    """Also for a file with other names."""
    peer = of_torchvision()
    state = torch.load(peer.file, weights_only=True)
    state["encoder.layers.encoder_layer_3.extra"] = state.pop("encoder.layers.encoder_layer_3.ln_2.bias")
    torch.save(state, "w.pth")
    with pytest.raises(ValueError, match=r"1 missing: blocks\.3\.norm2\.bias; 1 unexpected: blocks\.3\.extra"):
        load_weights(build_model("vit_t_16", 5, (SIDE, SIDE)), read_weights("w.pth"))


def test_tensors_of_unexpected_shapes(here):
    state = build_model("vit_xs_4", 2, (8, 8)).state_dict()
    torch.save(state | {"pos_embed": torch.zeros(5)}, "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth can't be used: its position embedding has the shape \(5,\)"):
        read_weights("w.pth")
    of_google()
    arrays = dict(np.load("google.npz"))
    arrays["Transformer/encoderblock_3/MultiHeadDotProductAttention_1/query/kernel"] = np.zeros(3, np.float32)
    np.savez("w.npz", **arrays)
    with pytest.raises(ValueError, match=r"w\.npz can't be used"):
        read_weights("w.npz")


@pytest.mark.parametrize("missing", ["k_proj", "v_proj"])
def test_queries_without_keys_or_values(here, missing):
    of_hugging_face_vit(in_memory=True)
    state = torch.load("in_memory.bin", weights_only=True)
    torch.save({name: tensor for name, tensor in state.items() if f"2.attention.{missing}" not in name}, "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth can't be used: it lacks the keys or values"):
        read_weights("w.pth")


def test_names_that_differ_only_by_a_prefix(here):
    state = build_model("vit_xs_4", 2, (8, 8)).state_dict()
    torch.save({f"backbone.{name}": t for name, t in state.items()} | {"head.bias": torch.zeros(2)}, "w.pth")
    with pytest.raises(ValueError, match=r"differ only by the prefix 'backbone\.'"):
        read_weights("w.pth")


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: of_timm("vit_tiny_patch16_224", "", "w.pth"), (0.5, "bicubic", 0.9)),
        (lambda: of_timm("vit_small_patch14_dinov2", "", "w.pth"), (0.485, "bicubic", 0.875)),
        (of_torchvision, (0.485, "bilinear", 0.875)),
        (of_hugging_face_vit, (0.5, "bilinear", 1.0)),
        (of_google, (0.5, "bilinear", 1.0)),
        (of_mae, (0.485, "bicubic", 0.875)),
    ],
)
def test_preprocessing_of_each_source(here, make, expected):
    found = read_weights(make().file).preprocessing
    assert (found["image_mean"][0], found["interpolation"], found["eval_crop"]) == expected


def test_epsilon_and_gelu_follow_the_source(here):
    assert read_weights(of_google().file).variant == {"activation": "gelu_tanh"}
    assert read_weights(of_hugging_face_vit().file).variant == {"activation": "gelu", "norm_eps": 1e-12}
    assert read_weights(of_torchvision().file).variant == {"activation": "gelu"}


def test_descriptions_beside_the_file_are_read(here):
    """Written by the libraries themselves."""
    config = transformers.ViTConfig(**HF_SIZES, layer_norm_eps=1e-5, hidden_act="gelu_pytorch_tanh")
    transformers.ViTForImageClassification(config).save_pretrained("hf")
    processor = transformers.ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], size={"height": 64, "width": 64}, resample=3)
    processor.save_pretrained("hf")
    found = read_weights("hf/model.safetensors")
    assert found.variant == {"activation": "gelu_tanh", "norm_eps": 1e-5}
    assert found.preprocessing["image_mean"] == (0.1, 0.2, 0.3)
    assert (found.preprocessing["interpolation"], found.preprocessing["eval_crop"]) == ("bicubic", 1.0)

    peer = timm.create_model("vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    timm.models.save_for_hf(peer, "timm", safe_serialization=True)
    found = read_weights("timm/model.safetensors").preprocessing
    assert found == {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3, "interpolation": "bicubic", "eval_crop": 0.9}


def test_mean_zero_is_valid(here):
    (here / "config.json").write_text('{"pretrained_cfg": {"mean": [0, 0.0, 0], "std": [1, 1, 1]}}')
    found = read_weights(of_timm("vit_tiny_patch16_224", "", "w.pth").file).preprocessing
    assert (found["image_mean"], found["image_std"]) == ((0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize(
    "config",
    [
        '{"pretrained_cfg": {"mean": [0.5, NaN, 0.5], "std": "x", "interpolation": ["bicubic"], "crop_pct": 7}}',
        '{"pretrained_cfg": {"mean": [-0.1, 0, 0], "std": [0, 1, 1], "crop_pct": true}}',
        '{"hidden_act": ["gelu"], "layer_norm_eps": "1"}',
        '{"pretrained_cfg": 3}',
        "[1, 2]",
        "[" * 100_000,
        "no JSON",
    ],
)
def test_invalid_descriptions_are_ignored(here, config):
    (here / "config.json").write_text(config)
    peer = of_timm("vit_tiny_patch16_224", "", "w.pth")
    found = read_weights(peer.file)
    assert found.variant == {"activation": "gelu"}
    assert found.preprocessing["image_mean"] == (0.5, 0.5, 0.5)
    assert found.preprocessing["eval_crop"] == 0.9


def test_hostile_npz_files(here):
    """Pickled objects, a zip bomb, and headers that claim more values than the file holds."""
    good = {"Transformer/encoder_norm/scale": np.zeros(3, np.float32)}
    np.savez("objects.npz", **good, x=np.array([Trap()], dtype=object))
    np.savez_compressed("bomb.npz", **good, x=np.zeros(10_000_000, np.uint8))
    np.savez("claims.npz", **good)
    content = (here / "claims.npz").read_bytes()
    assert content.count(b"'shape': (3,)") == 1
    claiming = content.replace(b"'shape': (3,), }     ", b"'shape': (3000000), }")
    for name in ("objects.npz", "bomb.npz"):
        with pytest.raises(ValueError, match=rf"{name} can't be opened as weights"):
            read_weights(name)
    (here / "claims.npz").write_bytes(claiming)
    with pytest.raises(ValueError, match="damaged"):  # by its checksum
        read_weights("claims.npz")
    with zipfile.ZipFile("claims.npz", "w") as archive:
        header = b"\x93NUMPY\x01\x00\x76\x00" + b"{'descr': '<f4', 'fortran_order': False, 'shape': (3000000000000,), }"
        archive.writestr("Transformer/encoder_norm/scale.npy", header.ljust(127) + b"\n" + bytes(12))
    with pytest.raises(ValueError, match=r"claims\.npz can't be opened as weights"):
        read_weights("claims.npz")
    assert not (here / "canary").exists()


class Trap:
    def __reduce__(self):
        return (os.mkdir, ("canary",))


def test_fortran_order_and_file_name_do_not_matter(here):
    peer = of_google()
    arrays = {name: np.asfortranarray(array) for name, array in np.load("google.npz").items()}
    np.savez("weights", **arrays)
    (here / "weights.npz").rename("weights.pth")
    plain, other = read_weights(peer.file).state, read_weights("weights.pth").state
    assert all(torch.equal(plain[name], tensor) for name, tensor in other.items())
    state = load_file(of_hugging_face_vit().file)
    save_file(state, "weights.bin")
    assert read_weights("weights.bin").source == "Hugging Face's ViT"
