"""nets/weights/load.py: finding, downloading (from a fake hub) and loading weights; resampling as in timm."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file, save, save_file

from nets import arguments
from nets.factory import restore_model
from nets.vit import ACTIVATIONS, resample_pos_embed, vit
from nets.weights.load import load_weights, read_weights
from nets.weights.pretrained import HUB_REPOS, find_pretrained
from nets.weights.safe_load import read_header


def tiny(num_classes=4, input_shape=(16, 16), **options):
    torch.manual_seed(1)
    return vit(input_shape, num_classes=num_classes, name="vit_xs_4", **options)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model_data").mkdir()
    return tmp_path


@pytest.fixture
def hub(here, monkeypatch):
    """A fake `hf_hub_download` that serves timm's tiny ViT with random weights and records requests."""
    torch.manual_seed(0)
    peer = timm.create_model("vit_tiny_patch16_224").eval()
    save_file(peer.state_dict(), here / "cached.safetensors")
    requested = []

    def hf_hub_download(repo_id, filename, revision=None, local_files_only=False):
        if filename != "model.safetensors":
            raise EntryNotFoundError("no such file")
        requested.append(repo_id)
        return str(here / "cached.safetensors")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr("nets.weights.hub.find_obstacle", lambda request: "")
    return SimpleNamespace(peer=peer, requested=requested)


def test_pretrained_from_the_hub_equals_timm(hub, capsys):
    model = vit(input_shape=[224, 224], pretrained=True, num_classes=1000, name="vit_t_16").eval()
    assert hub.requested == ["timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"]
    x = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), hub.peer(x), atol=1e-4, rtol=0)
    assert model.arguments["activation"] == "gelu"
    assert "excluded" not in capsys.readouterr().out


def test_pretrained_with_another_head_and_shape(hub, capsys):
    model = vit(input_shape=[160, 224], pretrained=True, num_classes=7, name="vit_t_16").eval()
    output = capsys.readouterr().out
    assert "head of 1000 classes isn't loaded; the new head has 7 classes" in output
    assert "resampled to 10 x 14 patches" in output
    assert torch.equal(model.blocks[3].mlp.fc1.weight, hub.peer.blocks[3].mlp.fc1.weight)
    assert model.head.weight.std() > 0.01


def test_every_hub_repository_exists_in_timm():
    for repo in HUB_REPOS.values():
        cfg = timm.models.get_pretrained_cfg(repo.removeprefix("timm/"))
        assert cfg.hf_hub_id in ("timm/", repo), repo


def test_model_data_is_searched_before_the_hub(hub, here):
    save_file(hub.peer.state_dict(), here / "model_data" / "vit_t_16.safetensors")
    assert str(find_pretrained("vit_t_16").path) == "model_data/vit_t_16.safetensors"
    assert hub.requested == []


def test_bubbliiiings_file_uses_tanh_gelu(here):
    (here / "model_data" / "vit-patch_16.pth").touch()
    torch.save(tiny().state_dict(), find_pretrained("vit_b_16").path)
    assert read_weights("model_data/vit-patch_16.pth").variant == {"activation": "gelu_tanh"}


class ReadError(Exception):
    """An error of an HTTP library when the connection breaks."""


@pytest.mark.parametrize("error", [LocalEntryNotFoundError, ReadError])
def test_offline_error_has_a_remedy(here, monkeypatch, error):
    def offline(repo_id, filename, revision=None):
        raise error("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(FileNotFoundError, match=r"augreg2_in21k_ft_in1k.*put it at model_data/vit_b_16\.safetensors"):
        vit(pretrained=True)


def test_backbone_without_published_weights(here):
    with pytest.raises(ValueError, match=r"no weights are published for backbone='vit_t_4'"):
        vit([16, 16], pretrained=True, name="vit_t_4")


@pytest.mark.parametrize("grid", [(24, 24), (10, 14), (7, 7), (14, 14)])
def test_resampling_equals_timm(grid):
    pos_embed = torch.randn(1, 1 + 14 * 14, 8, generator=torch.Generator().manual_seed(0))
    for antialias in (False, True):
        peer = timm.layers.resample_abs_pos_embed(pos_embed, list(grid), antialias=antialias)
        own = resample_pos_embed(pos_embed, (14, 14), grid, antialias=antialias)
        torch.testing.assert_close(own, peer, atol=1e-6, rtol=0)


def test_resampling_from_a_rectangular_grid():
    pos_embed = torch.randn(1, 1 + 4 * 6, 8, generator=torch.Generator().manual_seed(0))
    peer = timm.layers.resample_abs_pos_embed(pos_embed, [6, 4], [4, 6], antialias=False)
    torch.testing.assert_close(resample_pos_embed(pos_embed, (4, 6), (6, 4)), peer, atol=1e-6, rtol=0)


@pytest.mark.parametrize("target", [(16, 32), (16, 16), (32, 64)])
def test_grid_of_a_checkpoint(here, target):
    """With equal, fewer or more tokens: always resampled, and never from a square."""
    source = tiny(input_shape=(32, 16) if target == (16, 32) else (16, 64))
    torch.save({"weights": source.state_dict(), "model": source.arguments}, "w.pth")
    model = tiny(input_shape=target)
    load_weights(model, read_weights("w.pth"))
    expected = resample_pos_embed(source.pos_embed.detach(), source.grid, model.grid)
    assert torch.equal(model.pos_embed, expected)


def test_state_dict_with_a_rectangular_grid_is_an_error(here):
    torch.save(tiny(input_shape=(32, 16)).state_dict(), "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth: its position embedding has 32 patches, which is not a square"):
        load_weights(tiny(), read_weights("w.pth"))


def test_positions_are_resampled_on_load(here):
    torch.save(tiny().state_dict(), "small.pth")
    model = tiny(input_shape=(32, 16))
    load_weights(model, read_weights("small.pth"))
    assert model.pos_embed.shape == (1, 1 + 8 * 4, 192)
    assert model(torch.zeros(1, 3, 32, 16)).shape == (1, 4)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_state_dict_round_trip(here, suffix):
    state = tiny().state_dict()
    torch.save(state, "w.pth")
    save_file(state, "w.safetensors")
    model = tiny()
    torch.nn.init.zeros_(model.head.weight)
    load_weights(model, read_weights(f"w.{suffix}"))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("norm.bias"), "1 missing: norm.bias"),
        (lambda s: s.update({"extra.weight": torch.zeros(1)}), "1 unexpected: extra.weight"),
        (lambda s: s.update({"norm.bias": torch.zeros(3)}), r"1 of another shape: norm.bias \(3,\) for \(192,\)"),
    ],
)
def test_differences_are_listed(here, change, message):
    state = tiny().state_dict()
    change(state)
    torch.save(state, "w.pth")
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_weights(model, read_weights("w.pth"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def dinov2_of_timm(size: int) -> torch.nn.Module:
    """timm's network with random LayerScale."""
    peer = timm.create_model("vit_small_patch14_dinov2", img_size=size, num_classes=5).eval()
    for name, parameter in peer.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.uniform_(parameter, -2, 2)
    return peer


@pytest.mark.parametrize("size", [70, 140])
def test_layer_scale_is_folded(here, size):
    torch.manual_seed(0)
    peer = dinov2_of_timm(size)
    torch.save(peer.state_dict(), "dino.pth")
    own = vit(input_shape=[size, size], num_classes=5, name="vit_s_14", activation="gelu").eval()
    load_weights(own, read_weights("dino.pth"))
    pixels = torch.randn(2, 3, size, size)
    with torch.inference_mode():
        torch.testing.assert_close(own(pixels), peer(pixels), atol=1e-4, rtol=0)
        torch.testing.assert_close(own.forward_features(pixels), peer.forward_features(pixels), atol=1e-4, rtol=0)


def test_real_dinov2_weights_give_timms_outputs(shared, capsys):
    path = shared / "models" / "dinov2_vits14_saliency_fp16.safetensors"
    state = {name: value.float() for name, value in load_file(path).items()}
    peer = timm.create_model("vit_small_patch14_dinov2", num_classes=0).eval()
    peer.load_state_dict(state)
    own = vit(input_shape=[518, 518], num_classes=3, name="vit_s_14", activation="gelu").eval()
    load_weights(own, read_weights(path))
    assert "its head of no classes isn't loaded" in capsys.readouterr().out
    pixels = torch.randn(1, 3, 518, 518, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(own.forward_features(pixels), peer.forward_features(pixels), atol=1e-3, rtol=1e-3)


def test_weights_without_a_head(here, capsys):
    state = {name: value for name, value in tiny().state_dict().items() if not name.startswith("head.")}
    torch.save(state, "w.pth")
    load_weights(tiny(), read_weights("w.pth"))
    assert "head of no classes" in capsys.readouterr().out


class Trap:
    def __reduce__(self):
        return (os.mkdir, ("canary",))


def test_no_code_in_a_file_is_run(here):
    torch.save({"weights": Trap()}, "trap.pth")
    with pytest.raises(ValueError, match=r"trap\.pth"):
        read_weights("trap.pth")
    assert not Path("canary").exists()


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"hello", b"version https://git-lfs.github.com/spec/v1\n", bytes(range(256)) * 9]
)
def test_files_without_weights(here, name, content):
    (here / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} can't be opened as weights"):
        read_weights(name)


def test_missing_file_and_missing_state_dict(here):
    with pytest.raises(FileNotFoundError, match="no file none"):
        read_weights("none.pth")
    torch.save([1, 2], "list.pth")
    with pytest.raises(ValueError, match="no state dict"):
        read_weights("list.pth")


REGISTERS = torch.zeros(1, 2, 192)


@pytest.mark.parametrize(
    ("arguments", "tensors"),
    [
        ({"activation": "relu"}, {}),
        ({"activation": ["x"]}, {}),
        ({"num_registers": 10**13}, {}),
        ({"num_registers": -5}, {"reg_token": REGISTERS}),
        ({"norm_eps": "x"}, {}),
        ({"pooling": "mean"}, {}),
        ({"input_shape": [0, 0]}, {}),
        ({"input_shape": [32, 32]}, {}),
        ({}, {"patch_embed.proj.weight": torch.zeros(192, 3, 0, 0)}),
        ({}, {"patch_embed.proj.weight": torch.tensor(1.0)}),
        ({}, {"head.bias": torch.tensor(1.0)}),
        ({}, {"reg_token": torch.zeros(3)}),
        ({}, {"pos_embed": torch.zeros(1, 1, 192)}),
        ({}, {"pos_embed": torch.zeros(1, 0, 192)}),
        ({}, {"pos_embed": 3}),
    ],
)
def test_metadata_of_a_file_is_checked(here, arguments, tensors):
    model = tiny()
    state = model.state_dict() | tensors
    torch.save({"weights": state, "model": model.arguments | arguments}, "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth can't be used: "):
        load_weights(tiny(), read_weights("w.pth"))
    if tensors:
        torch.save(state, "w.pth")
        with pytest.raises(ValueError, match=r"w\.pth (can't be used: |doesn't fit)"):
            load_weights(tiny(), read_weights("w.pth"))


@pytest.mark.parametrize("names", [[["light"]], "light", {"light": 0}, [1, 2]])
def test_class_names_of_a_file_are_checked(here, names):
    model = tiny()
    torch.save({"weights": model.state_dict(), "model": model.arguments, "class_names": names}, "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth can't be used: its class_names are not a list of text"):
        read_weights("w.pth")


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model.", "net._orig_mod."])
def test_prefixes_of_torch_do_not_change_the_source(here, prefix):
    torch.save({f"{prefix}{name}": tensor for name, tensor in tiny().state_dict().items()}, "w.pth")
    weights = read_weights("w.pth")
    assert (weights.source, weights.preprocessing["image_mean"]) == ("timm's ViT", (0.5, 0.5, 0.5))


def test_a_description_beside_other_weights_is_not_theirs(here):
    """`config.json` belongs to weights under the hub's name, or to the only ones; others have a description each."""
    Path("config.json").write_text('{"pretrained_cfg": {"mean": [0.1, 0.2, 0.3]}, "layer_norm_eps": 0.5}')
    for name in ("model.safetensors", "a.safetensors", "b.safetensors"):
        save_file(tiny().state_dict(), name)
    Path("b.config.json").write_text('{"pretrained_cfg": {"mean": [0.4, 0.4, 0.4]}}')
    read = {name: read_weights(f"{name}.safetensors") for name in ("model", "a", "b")}
    assert [weights.preprocessing["image_mean"][0] for weights in read.values()] == [0.1, 0.5, 0.4]
    assert ["norm_eps" in weights.variant for weights in read.values()] == [True, False, False]
    for name in ("model.safetensors", "b.safetensors"):
        Path(name).unlink()
    assert read_weights("a.safetensors").preprocessing["image_mean"] == (0.1, 0.2, 0.3)


def test_weights_put_into_the_folder_by_hand_have_the_published_preprocessing(here):
    """DINO's have timm's names, and ImageNet's mean instead of timm's usual one."""
    for name in ("vit_s_8", "vit_s_16"):
        save_file(tiny().state_dict(), f"{name}.safetensors")
        found = read_weights(find_pretrained(name, folder=here)).preprocessing
        cfg = timm.models.get_pretrained_cfg(HUB_REPOS[name].removeprefix("timm/"))
        assert (found["image_mean"], found["image_std"]) == (cfg.mean, cfg.std)
        assert (found["interpolation"], found["eval_crop"]) == (cfg.interpolation, cfg.crop_pct)
    Path("vit_s_8.config.json").write_text('{"pretrained_cfg": {"mean": [0.4, 0.4, 0.4]}}')
    assert read_weights(find_pretrained("vit_s_8", folder=here)).preprocessing["image_mean"] == (0.4, 0.4, 0.4)


def test_files_in_a_folder_that_is_not_utf8(here):
    folder = here / os.fsdecode(b"\xff")
    folder.mkdir()
    Path("w.safetensors").write_bytes(save(tiny().state_dict(), {"a": "b"}))
    shutil.copy("w.safetensors", folder)
    weights = read_weights(folder / "w.safetensors")
    assert all(torch.equal(tensor, weights.state[name]) for name, tensor in read_weights("w.safetensors").state.items())
    assert read_header(folder / "w.safetensors") == {"a": "b"}


def test_unsupported_activation_is_an_error(here, capsys):
    torch.save(tiny().state_dict(), "w.pth")
    Path("config.json").write_text('{"hidden_act": "quick_gelu"}')
    with pytest.raises(ValueError, match=r"w\.pth can't be used: .*config\.json has hidden_act='quick_gelu'"):
        read_weights("w.pth")
    Path("config.json").write_text('{"hidden_act": "gelu", "layer_norm_eps": 1' + "0" * 400 + "}")
    load_weights(tiny(), read_weights("w.pth"))
    assert "timm's ViT: activation gelu" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64])
def test_types_that_weights_do_not_have_are_refused(here, dtype):
    state = tiny().state_dict()
    save_file(state | {"norm.weight": state["norm.weight"].to(dtype)}, "w.safetensors")
    with pytest.raises(ValueError, match=r"w\.safetensors can't be used: its norm.weight is of type"):
        read_weights("w.safetensors")


def test_weights_in_float64_are_converted(here):
    """Files of other projects; a checkpoint must have the types of its network."""
    model, state = tiny(), tiny(num_classes=4).state_dict()
    save_file({name: tensor.double() for name, tensor in state.items()}, "w.safetensors")
    load_weights(model, read_weights("w.safetensors"))
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    with pytest.raises(ValueError, match=r"is of type torch\.float64, not torch\.float32"):
        restore_model(model.arguments, {name: tensor.double() for name, tensor in state.items()})


def test_names_of_activations():
    assert set(arguments.ACTIVATIONS) == set(ACTIVATIONS)
