"""nets/torchvision_networks.py and nets/timm_networks.py: against the libraries' networks, frozen, thawed, in runs."""

import copy
import functools
import re
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import torchvision
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from torch import nn

import train
from nets.factory import build_meta_model, build_model, expected_preprocessing, restore_model
from nets.timm_networks import published_by_timm
from nets.torchvision_networks import TORCHVISION
from nets.weights.load import load_weights, read_weights
from tests.conftest import NAMES, SMALL, settings, write_back
from utils.config.frozen import Frozen
from utils.config.train_config import StageConfig
from utils.data.image_list import read_list
from utils.data.preprocessing import Preprocessing
from utils.inference.classifier import load_classifier
from utils.inference.explain import explain
from utils.modeling.build import build_meta_network, build_network, check_network
from utils.modeling.pixel_network import PixelNetwork, ThawedPart
from utils.runs.checkpoint import BEST, LAST, load_checkpoint
from utils.training.optimizer import build_optimizer, parameter_groups
from utils.training.trainer import Trainer

SIDE = 64
FAMILIES = {
    "resnet18": 8,
    "mobilenetv2": 18,
    "vgg11_bn": 4,
    "swin_transformer_tiny": 12,
    "timm/resnet10t": 4,
    "timm/convnext_atto": 12,
    "timm/mobilenetv3_small_050": 12,
    "timm/test_vit": 6,
}
"""A small network of each family, and its number of blocks."""
DIVIDED = {
    "test_vit_relpos": 9,
    "eva02_tiny_patch14_224": 12,
    "vit_small_patch16_dinov3": 12,
    "vit_small_patch16_rope_mixed_224": 12,
    "swinv2_tiny_window8_256": 12,
    "hiera_tiny_224": 12,
}
"""Networks of timm whose blocks get more than the output of the block before, such as positions; number of blocks."""
SLOW = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in (
        "test_byobnet",
        "test_efficientnet",
        "test_mambaout",
        "test_nfnet",
        "vgg11",
        "mobilenetv4_conv_small",
        "densenet121",
        "regnetx_002",
        "resmlp_12_224",
        "mixer_s32_224",
        "beit_base_patch16_224",
        "deit3_small_patch16_224",
        "vit_wee_patch16_reg1_gap_256",
        "xcit_nano_12_p16_224",
        "cait_xxs24_224",
        "twins_svt_small",
        "poolformer_s12",
        "pvt_v2_b0",
        "coat_lite_tiny",
        "mobilevit_xxs",
        "hgnetv2_b0",
        "edgenext_xx_small",
        "fastvit_t8",
        "focalnet_tiny_srf",
        "vit_base_patch16_siglip_gap_224",
    )
]
"""Other families of timm."""
WITH_BATCH_NORM = ("resnet18", "mobilenetv2", "vgg11_bn", "timm/resnet10t", "timm/mobilenetv3_small_050")


class Narrow(nn.Linear):
    """A linear layer with 64 features in place of VGG's 4096, to avoid 119 million weights in its classifier."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(*(64 if features == 4096 else features for features in (in_features, out_features)))


@pytest.fixture(autouse=True)
def narrow_vgg(request, monkeypatch) -> None:
    """Build both our VGG and torchvision's with narrow layers."""
    if request.function is not test_every_torchvision_network_builds_and_freezes:
        monkeypatch.setattr("torchvision.models.vgg.nn", SimpleNamespace(**vars(nn) | {"Linear": Narrow}))


def build(name: str, shape: tuple[int, int] = (SIDE, SIDE), **options) -> nn.Module:
    model = copy.deepcopy(cached_build(name, shape, **options))
    torch.manual_seed(0)
    return model


@functools.cache
def cached_build(name: str, shape: tuple[int, int], **options) -> nn.Module:
    torch.manual_seed(0)
    return build_model(name, 5, shape, **options)


def images(n: int = 2, shape: tuple[int, int] = (SIDE, SIDE)) -> torch.Tensor:
    return torch.randn(n, 3, *shape, generator=torch.Generator().manual_seed(1))


def shape_of(name: str) -> tuple[int, int]:
    """A small input shape that fits the patches and windows of a network of timm."""
    return (56, 84) if "patch14" in name else (SIDE, SIDE) if "window" in name else (64, 96)


def parameters_of(piece: nn.Module | nn.Parameter) -> list[nn.Parameter]:
    return [piece] if isinstance(piece, nn.Parameter) else list(piece.parameters())


def peer_of(name: str, shape: tuple[int, int]) -> nn.Module:
    torch.manual_seed(2)
    if name in TORCHVISION:
        return torchvision.models.get_model(TORCHVISION[name].name, num_classes=5).eval()
    options = {"img_size": shape} if "vit" in name else {}
    return timm.create_model(name.removeprefix("timm/"), num_classes=5, **options).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_library_weights_give_the_library_networks_outputs(here, name, shape=(96, 64)):
    peer = peer_of(name, shape)
    torch.save(peer.state_dict(), "w.pth")
    model = build(name, shape).eval()
    load_weights(model, read_weights("w.pth", of_vit=False))
    with torch.inference_mode():
        torch.testing.assert_close(model(images(shape=shape)), peer(images(shape=shape)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_frozen_part_is_constant_and_thawed_part_completes_the_forward(name):
    """At any number of frozen blocks; gradients and batch norm statistics stay out of the frozen part."""
    model = build(name, drop_rate=0.3, drop_path_rate=0.3)
    depth = len(model.parts()) - 2
    assert depth == FAMILIES[name]
    x = images(4)
    expected = model.eval()(x)
    for blocks in sorted({0, depth // 2, depth}):
        model.freeze_backbone(blocks)
        frozen = {name: value.clone() for name, value in model.frozen_state().items()}
        features = model.train().forward_frozen(x)
        assert not features.requires_grad
        assert torch.equal(features, model.forward_frozen(x))
        assert torch.allclose(model.eval().forward_thawed(features), expected, atol=1e-5)
        twin = copy.deepcopy(model).train()
        twin(x).sum().backward()
        assert all(torch.equal(value, frozen[name]) for name, value in twin.frozen_state().items())
        with_gradient = {name for name, p in twin.named_parameters() if p.grad is not None}
        assert with_gradient == {name for name, _ in model.named_parameters()} - frozen.keys()


@pytest.mark.parametrize("name", WITH_BATCH_NORM)
def test_batch_norm_statistics_change_only_in_the_thawed_part(name):
    model = build(name)
    model.freeze_backbone(1)
    before = {name: value.clone() for name, value in model.named_buffers() if name.endswith("running_mean")}
    model.train()(images(4))
    moved = {name for name, value in model.named_buffers() if name in before and not torch.equal(value, before[name])}
    assert moved == before.keys() - model.frozen_state().keys()
    assert before.keys() & model.frozen_state().keys()
    model.freeze_backbone("all")
    assert before.keys() <= model.frozen_state().keys()


@pytest.mark.parametrize("name", TORCHVISION)
def test_every_torchvision_network_builds_and_freezes(name):
    model = build_meta_model(name, 5, (64, 96))
    with torch.device("meta"):
        peer = torchvision.models.get_model(TORCHVISION[name].name, num_classes=5)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in peer.parameters())
    assert {n: t.shape for n, t in model.state_dict().items()} == {
        n: t.shape for n, t in model.to_own_names(peer.state_dict()).items()
    }
    model.freeze_backbone("all")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}


@pytest.mark.parametrize("name", [*FAMILIES, "vit_xs_4"])
def test_each_parameter_belongs_to_one_part_or_the_head(name):
    """Otherwise it would not be frozen, and would be missing in the key of cached features."""
    model = build(name, **({"num_registers": 2} if name.startswith("vit") else {}))
    owned = [parameter for part in model.parts() for piece in part.owned for parameter in parameters_of(piece)]
    owned += model.head.parameters()
    assert len({id(parameter) for parameter in owned}) == len(owned)
    assert {id(parameter) for parameter in owned} == {id(parameter) for parameter in model.parameters()}


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_increase_from_stem_to_head(name):
    layers = build(name).layers()
    numbers = list(layers.values())
    assert numbers[0] == 0
    assert numbers == sorted(numbers)
    assert layers["head.weight"] == max(numbers) == FAMILIES[name] + 1


@pytest.mark.parametrize("name", [*DIVIDED, "test_vit", "convnext_atto", *SLOW])
def test_parts_of_a_timm_network_give_what_the_network_gives(name):
    """Bit for bit, for every batch size, and in training with the same dropped paths."""
    model = build(f"timm/{name}", shape_of(name), drop_path_rate=0.5)
    depth = len(model.parts()) - 2
    assert depth == DIVIDED.get(name, depth) > 1
    x = images(3, shape_of(name))
    for batch in (x[:2], x):
        for training in (False, True):
            model.train(training)
            outputs = []
            for forward in (
                model.forward_embedding,
                lambda x: model.network.forward_head(model.network.forward_features(x)),
            ):
                torch.manual_seed(0)
                outputs.append(forward(batch))
            assert torch.equal(*outputs)
    owned = [p for part in model.parts() for piece in part.owned for p in parameters_of(piece)]
    assert set(map(id, owned)) == set(map(id, model.network.parameters()))  # CoaT's blocks share some


@pytest.mark.parametrize("name", ["test_vit", "swinv2_tiny_window8_256", "convnext_atto", "eva02_tiny_patch14_224"])
def test_layers_agree_with_timm(name):
    """But for the last norm, which timm's layers count to the last block and ours to the head."""
    model = build(f"timm/{name}", shape_of(name))
    expected = group_parameters(model.network, model.network.group_matcher(), reverse=True)
    found = {name.removeprefix("network."): layer for name, layer in model.layers().items() if "network" in name}
    last_norm = {"norm.weight", "norm.bias"}
    assert {name: found[name] for name in found.keys() - last_norm} == {
        name: expected[name] for name in found.keys() - last_norm
    }


def test_layer_decay_agrees_with_timm():
    """In the learning rate and weight decay of each parameter below the last norm."""
    name = "eva02_tiny_patch14_224"
    model = build(f"timm/{name}", shape_of(name))
    groups = parameter_groups(model, 0.1, 0.5)
    found = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    peer = timm.create_model(name, num_classes=5)
    named = dict(model.network.named_parameters())
    names = {id(p): name for name, p in peer.named_parameters()}
    for group in param_groups_layer_decay(peer, 0.1, peer.no_weight_decay(), layer_decay=0.5):
        for parameter in group["params"]:
            if (name := names[id(parameter)]) in named:
                assert found[id(named[name])] == (group["lr_scale"], group["weight_decay"]), name


@pytest.mark.parametrize("name", ["test_vit", "vit_small_patch16_dinov3", "convnext_atto"])
def test_feature_map_of_a_timm_network_has_a_gradient_at_all_positions(name):
    """Although heads on the class token don't read the last block's other tokens."""
    model = build(f"timm/{name}", (64, 96)).eval()
    found = []
    hook = model.feature_map_layer.register_forward_hook(lambda _, __, output: found.append(output))
    logits = model(images(1, (64, 96)))
    hook.remove()
    (gradient,) = torch.autograd.grad(logits[0, 0], found[-1])
    rows, columns = (2, 3) if name == "convnext_atto" else (4, 6)
    gradient = model.to_feature_map(gradient)
    assert gradient.shape[2:] == (rows, columns)
    assert gradient.abs().amax(dim=1).gt(0).all()


def test_resized_network_has_parts_for_the_new_shape():
    """Sizes of feature maps are numbers in its parts."""
    model = build("timm/pvt_v2_b0").eval()
    model.freeze_backbone(2)
    model.resize((96, 64))
    x = images(2, (96, 64))
    assert torch.equal(model.forward_embedding(x), model.network.forward_head(model.network.forward_features(x)))
    assert all(not parameter.requires_grad for parameter in model.frozen_state().values())


def test_embedding_is_the_input_of_the_head():
    for name in FAMILIES:
        model = build(name).eval()
        embedding = model.forward_embedding(images())
        assert embedding.shape == (2, model.head.in_features), name
        torch.testing.assert_close(model.head(embedding), model(images()))


@pytest.mark.parametrize("name", FAMILIES)
def test_feature_maps_are_spatial(name):
    model = build(name, (64, 96)).eval()
    found = []
    handle = model.feature_map_layer.register_forward_hook(
        lambda _, __, output: found.append(model.to_feature_map(output))
    )
    model(images(shape=(64, 96)))
    handle.remove()
    (features,) = found
    rows, columns = features.shape[2:]
    assert (len(features), rows * 96) == (2, columns * 64)
    assert features.shape[1] > columns


RUN = SMALL | {
    "input_shape": (32, 32),
    "freeze_epoch": 2,
    "unfreeze_epoch": 3,
    "freeze_blocks": 1,
    "feature_views": 1,
    "save_period": 1,
    "init_lr": 1e-3,
    "min_lr": 1e-5,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_one_frozen_and_one_thawed_step(name):
    """Frozen weights don't change, all others do; the frozen step uses cached features, as in a run."""
    cpu = torch.device("cpu")
    config = settings(**SMALL | {"backbone": name, "input_shape": (SIDE, SIDE), "layer_decay": 0.8})
    model = build(name, drop_rate=0.1, drop_path_rate=0.1)
    network = PixelNetwork(model, Preprocessing.from_config(config), cpu)
    pixels = torch.randint(0, 256, (4, 3, SIDE, SIDE), dtype=torch.uint8)
    for part in (1, "nothing"):
        Frozen(part).apply(model)
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        inputs, trained = pixels, network
        if part != "nothing":
            inputs, trained = network.forward_frozen(pixels).detach(), ThawedPart(network)
        trainer = Trainer(trained.train(), cpu, "fp32", seed=0)
        loss, _ = trainer.train_step(inputs, torch.tensor([0, 1, 2, 3]), build_optimizer(model, config, 1e-3))
        assert loss.isfinite()
        changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
        learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert {"head.weight", "head.bias"} <= changed <= learning
        assert len(changed) > 0.9 * len(learning) or name == "timm/resnet10t"  # its blocks start with zero scale


@pytest.mark.graph
@pytest.mark.parametrize(
    "name", ["mobilenetv2", pytest.param("timm/convnext_atto", marks=pytest.mark.slow), "timm/test_vit"]
)
def test_run_with_frozen_and_thawed_stage(two_classes, capsys, name):
    """With cached features; the checkpoint opens as in predict.py and gives class activation maps."""
    train.main(settings(**RUN | {"backbone": name}))
    output = capsys.readouterr().out
    assert "features of 1 view of 36 images" in output
    assert re.search(r"attn_drop_rate +0\.1 -> 0\.0 +network: it has no such layers", output)
    run = next(Path("logs").iterdir())
    last = load_checkpoint(run / LAST)
    assert last["epoch"] == 3
    classifier = load_classifier(run, "cpu")
    images = read_list("cls_val.txt", 2)
    paths = [images.path(i) for i in range(len(images))]
    expected_top1 = last["history"][load_checkpoint(run / BEST)["epoch"]]["val_top1"]
    predictions = classifier.predict(paths)
    top1 = sum(prediction.label in path for prediction, path in zip(predictions, paths, strict=True)) / len(paths)
    assert top1 == pytest.approx(expected_top1, abs=1 / len(paths) + 1e-9)
    maps = explain(classifier, torch.stack([classifier.load(path) for path in paths]), torch.zeros(len(paths)).long())
    assert maps.cam.shape[0] == len(paths)
    assert maps.rollout is None


@pytest.mark.parametrize(("changes", "epoch"), [({}, 1), ({"ema_decay": 0.9, "cache_features": False}, 3)])
def test_convolutional_run_resumes_bit_for_bit(two_classes, changes, epoch):
    """Including the batch norm statistics of the network and of its EMA."""
    config = settings(**RUN | {"backbone": "timm/test_resnet", "unfreeze_epoch": 4, "device": "cpu"} | changes)
    train.main(config)
    run = next(Path("logs").iterdir())
    before = load_checkpoint(run / LAST)
    write_back(run, epoch)
    shutil.copy(run / LAST, run / BEST)
    train.main(config)
    after = load_checkpoint(run / LAST)
    for part in ("weights", "weights_in_training"):
        assert before[part].keys() == after[part].keys()
        assert all(torch.equal(value, after[part][name]) for name, value in before[part].items())


GROWING = [
    ("timm/test_vit", False),
    ("timm/resmlp_12_224", False),
    ("timm/resnet10t", True),
    ("timm/convnext_atto", True),
]


@pytest.mark.parametrize(("name", "fits"), GROWING)
def test_growing_images_need_a_network_of_any_input_size(name, fits):
    stages = (StageConfig(1, "nothing", 8, (160, 160)), StageConfig(1, "nothing"))
    config = settings(backbone=name, input_shape=(224, 224), stages=stages)
    with pytest.raises(ValueError, match="one input_shape for the whole run") if not fits else nullcontext():
        check_network(build_meta_network(config, 5), config)


def test_muon_requires_a_transformer():
    config = settings(backbone="resnet18", optimizer_type="muon")
    with pytest.raises(ValueError, match="isn't a transformer"):
        check_network(build_meta_network(config, 5), config)


def test_timm_network_is_restored_with_buffers_that_are_not_saved():
    """For example the relative positions of a Swin, which timm computes when it builds the network."""
    name, shape = "timm/swin_tiny_patch4_window7_224", (224, 224)
    model = build(name, shape).eval()
    again = restore_model(model.arguments, model.state_dict()).eval()
    with torch.inference_mode():
        assert torch.equal(again(images(1, shape)), model(images(1, shape)))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("resnet18", (0, 0), "must be height and width"),
        ("vgg11", (16, 16), "can't take such images"),
        ("timm/test_vit", (30, 64), "can't take such images"),
    ],
)
def test_invalid_input_shapes(name, shape, message):
    with pytest.raises(ValueError, match=rf"input_shape=\({shape[0]}, {shape[1]}\): .*{message}"):
        build_meta_model(name, 2, shape)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet19", "unknown name; choose one of vit_xs_4.*resnet18.*or timm/<name>"),
        ("timm/resnet51", "timm has no such network"),
        ("timm/resnet50.no_such", "timm/resnet50.no_such"),
        ("timm/hf-hub:someone/something", "timm has no such network"),
        ("timm/dla34", "its head is not a linear layer"),
        ("timm/deit_tiny_distilled_patch16_224", "its head is not a linear layer"),
    ],
)
def test_unsupported_networks(name, message):
    with pytest.raises(ValueError, match=message):
        build_meta_model(name, 2, (224, 224))


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="pip install timm"):
        build_model("timm/resnet18", 2, (64, 64))


def test_options_of_vits_only():
    with pytest.raises(ValueError, match=r"backbone='resnet18' has no activation, norm_eps: only vit_"):
        build_model("resnet18", 2, (64, 64), activation="gelu", norm_eps=1e-6)


def test_rates_are_set_in_every_layer():
    model = build("swin_transformer_tiny", drop_rate=0.2, attn_drop_rate=0.3, drop_path_rate=0.4)
    places = [m.p for m in model.modules() if isinstance(m, torchvision.ops.StochasticDepth)]
    assert (places[0], places[-1]) == (0, pytest.approx(0.4))
    assert {m.attention_dropout for m in model.modules() if hasattr(m, "attention_dropout")} == {0.3}
    assert model.ignored_rates == ()
    for name in ("resnet18", "mobilenetv2", "timm/resnet10t"):
        assert build(name, drop_rate=0.2).head_drop.p == 0.2
    vgg = build_meta_model("vgg11", 2, (64, 64), drop_rate=0.2)
    assert {module.p for module in vgg.modules() if isinstance(module, nn.Dropout)} == {0.2}
    assert build("timm/convnext_atto", drop_path_rate=0.2).ignored_rates == ("attn_drop_rate",)
    assert build("timm/vgg11", drop_path_rate=0.2).ignored_rates == ("attn_drop_rate", "drop_path_rate")


def test_transformer_property():
    kinds = {name: build(name).transformer for name in FAMILIES}
    assert {name for name, transformer in kinds.items() if transformer} == {
        "swin_transformer_tiny",
        "timm/convnext_atto",
        "timm/test_vit",
    }


def test_unexpected_weights_are_listed(here):
    torch.save(torchvision.models.resnet34(num_classes=5).state_dict(), "w.pth")
    with pytest.raises(ValueError, match=r"unexpected: network\.layer1\.2\.conv1\.weight"):
        load_weights(build("resnet18"), read_weights("w.pth", of_vit=False))


def test_head_of_other_classes_is_excluded_and_reported(here, capsys):
    torch.save(torchvision.models.resnet18().state_dict(), "w.pth")
    load_weights(build("resnet18"), read_weights("w.pth", of_vit=False))
    assert "its head of 1000 classes isn't loaded; the new head has 5 classes" in capsys.readouterr().out


def test_published_by_timm():
    repository, expected = published_by_timm("timm/resnet50")
    assert repository == "timm/resnet50.a1_in1k"
    assert expected["eval_crop"] == 0.95
    assert published_by_timm("timm/vit_base_patch16_224.augreg2_in21k_ft_in1k")[0].endswith("augreg2_in21k_ft_in1k")
    assert expected_preprocessing("timm/vit_base_patch16_224.augreg2_in21k_ft_in1k")["image_mean"] == (0.5, 0.5, 0.5)
    assert expected_preprocessing("vit_b_16") == {}


def test_weights_determine_preprocessing_that_is_not_set(two_classes):
    torch.save(torchvision.models.resnet18(num_classes=5).state_dict(), "resnet18.pth")
    timms = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32)
    torch.save(timms.state_dict(), "vit.pth")
    changes = {"input_shape": (32, 32), "model_path": "resnet18.pth", "backbone": "resnet18"}
    resolved, _, origin, _ = build_network(settings(**SMALL | changes), NAMES)
    assert (resolved.image_mean[0], resolved.interpolation, resolved.eval_crop) == (0.485, "bilinear", 0.875)
    assert origin["file"] == "resnet18.pth" and len(origin["sha256"]) == 64
    changes |= {"model_path": "vit.pth", "backbone": "vit_t_16", "eval_crop": 1.0}
    resolved, model, _, choices = build_network(settings(**SMALL | changes), NAMES)
    assert (resolved.image_mean[0], resolved.interpolation, resolved.eval_crop) == (0.5, "bicubic", 1.0)
    assert model.arguments["activation"] == "gelu"
    assert ("image_mean", (0.5, 0.5, 0.5), "expected by them", "weights") in choices
    _, model, *_ = build_network(settings(**SMALL | changes, activation="gelu_tanh"), NAMES)
    assert model.arguments["activation"] == "gelu_tanh"
    with pytest.raises(ValueError, match=r"unexpected: network\.cls_token, network\.pos_embed.*check backbone"):
        build_network(settings(**SMALL | changes | {"backbone": "resnet18"}), NAMES)


def test_timm_weights_are_resampled_as_in_timm(here):
    """The head has the same name in timm and here."""
    torch.save(peer_of("timm/test_vit", (64, 64)).state_dict(), "w.pth")
    peer = peer_of("timm/test_vit", (96, 64))
    timm.models.load_checkpoint(peer, "w.pth", filter_fn=timm.models.vision_transformer.checkpoint_filter_fn)
    model = build("timm/test_vit", (96, 64)).eval()
    load_weights(model, read_weights("w.pth", of_vit=False))
    with torch.inference_mode():
        x = images(shape=(96, 64))
        torch.testing.assert_close(model(x), peer(x), atol=1e-5, rtol=1e-4)


def test_description_beside_a_file_is_used_for_every_network(here):
    timm.models.save_for_hf(timm.create_model("resnet10t.c3_in1k"), "timm", safe_serialization=True)
    found = read_weights("timm/model.safetensors", of_vit=False).preprocessing
    known = timm.get_pretrained_cfg("resnet10t.c3_in1k")
    assert (found["image_mean"], found["eval_crop"]) == (known.mean, known.crop_pct)


def test_timm_network_with_tensor_names_of_a_vit(here):
    """A checkpoint of our own ViT doesn't fit it."""
    peer = timm.create_model("test_vit", num_classes=2, img_size=32)
    torch.save(peer.state_dict(), "w.pth")
    config = {"input_shape": (32, 32), "model_path": "w.pth", "backbone": "timm/test_vit"}
    _, model, *_ = build_network(settings(**SMALL | config), NAMES)
    pixels = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(model.eval()(pixels), peer.eval()(pixels), atol=1e-5, rtol=0)
    ours = build_model("vit_xs_4", 2, (32, 32))
    torch.save({"weights": ours.state_dict(), "model": ours.arguments}, "ours.pth")
    with pytest.raises(ValueError, match="doesn't fit this network"):
        build_network(settings(**SMALL | config | {"model_path": "ours.pth"}), NAMES)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2"])
def test_files_without_num_batches_tracked(name, here):
    state = {n: t for n, t in peer_of(name, (SIDE, SIDE)).state_dict().items() if "num_batches_tracked" not in n}
    torch.save(state, "w.pth")
    model = build(name)
    load_weights(model, read_weights("w.pth", of_vit=False))
    assert torch.equal(model.head.weight, list(state.values())[-2])


@pytest.mark.parametrize(
    ("name", "message"),
    [("timm/xception", "a deprecated name"), ("timm/shvit_s1", "its head is more than a linear layer")],
)
def test_unsupported_timm_networks(name, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        build_model(name, 2, (64, 64))


@pytest.mark.parametrize("name", ["legacy_seresnet18", "ghostnet_050"])
def test_in_place_modules_work_and_own_dropout_is_disabled(name):
    """Shifted batch norms make a missing ReLU visible. The frozen part must give the same output twice."""
    torch.manual_seed(0)
    peer = timm.create_model(name, num_classes=3).eval()
    for module in peer.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
    model = build_model(f"timm/{name}", 3, (64, 64))
    model.load_state_dict(model.to_own_names(peer.state_dict()))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), peer(images), rtol=1e-5, atol=0)
        model.train()
        model.freeze_backbone("all")
        torch.testing.assert_close(model.forward_frozen(images), model.forward_frozen(images), rtol=0, atol=0)
