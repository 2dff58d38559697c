"""nets/pretrained.py and nets/hub.py: the hub's own client against a server of its protocol on this machine, torch's
downloads from files."""

import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import torchvision
from huggingface_hub import constants
from safetensors.torch import save

import nets.hub
from nets import BACKBONES, build_model
from nets.hub import download_from_url
from nets.pretrained import find_pretrained
from nets.torchvision_networks import TORCHVISION, published_by_torchvision
from nets.weights import load_weights, read_weights

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download needs."""

    files: dict[str, bytes]
    lie = False

    def do_HEAD(self) -> None:
        match = re.fullmatch(r"/some/vit/resolve/(\w+)/([\w.]+)", self.path)
        if not match or match[1] not in ("main", "v1", COMMIT) or match[2] not in self.files:
            self.send_response(404)
            known = match and match[1] in ("main", "v1", COMMIT)
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RevisionNotFound")
            self.send_header("X-Error-Message", "not found")
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            return
        content = self.files[match[2]]
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        digest = hashlib.sha256(content + b"!" * self.lie).hexdigest()
        self.send_header("ETag", f'"{digest}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_GET = do_HEAD

    def log_message(self, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def hub(here, monkeypatch):
    """A hub that has some/vit, a tiny ViT with random weights; the client reads its address when it is imported."""
    torch.manual_seed(0)
    state = build_model("vit_xs_4", 3, (8, 8)).state_dict()
    description = {"pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "crop_pct": 0.75}}
    files = {"model.safetensors": save(state), "config.json": json.dumps(description).encode()}
    handler = type("Handler", (Hub,), {"files": files})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(here / "cache"))
    yield handler
    server.shutdown()
    server.server_close()


def fetch(name: str) -> dict:
    found = read_weights(find_pretrained("vit_xs_4", name))
    return {"origin": dict(found.origin), "mean": found.preprocessing["image_mean"], "of": found.source}


def test_a_name_on_the_hub_is_pinned_and_kept(hub, monkeypatch):
    content = hub.files["model.safetensors"]
    found = fetch("some/vit")
    assert found["origin"].pop("file").endswith(f"{COMMIT}/model.safetensors")
    expected = {"repository": "some/vit", "revision": COMMIT, "sha256": hashlib.sha256(content).hexdigest()}
    assert found == {"origin": expected, "mean": (0.1, 0.2, 0.3), "of": "timm's ViT"}
    hub.files = {}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for pinned in ("some/vit", f"some/vit@{COMMIT}"):  # from the cache
        assert fetch(pinned)["origin"]["revision"] == COMMIT


def test_what_cannot_be_had_says_what_to_do(hub, monkeypatch):
    with pytest.raises(FileNotFoundError, match="at revision v2 could not be fetched"):
        fetch("some/vit@v2")
    content = hub.files.pop("model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"none of model\.safetensors, pytorch_model\.bin"):
        fetch("some/vit")
    hub.files["model.safetensors"] = content
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="some/vit could not be fetched from the Hugging Face hub") as caught:
        fetch("some/vit")
    assert "put it, say model_data/vit.safetensors" in str(caught.value).replace(os.sep, "/")


def test_a_file_that_is_not_the_hubs_is_refused(hub):
    hub.lie = True
    with pytest.raises(ValueError, match="isn't the one that the hub told"):
        fetch("some/vit")


@pytest.mark.parametrize(
    "wanted", ["no/such/file.pth", "no/file.pth", "model_data/x", "nothing.pth", "/x", "owner/", "../x"]
)
def test_neither_a_file_nor_a_name(here, wanted):
    Path("model_data").mkdir(exist_ok=True)
    with pytest.raises(FileNotFoundError, match="no such file, and it is no name on the Hugging Face hub"):
        find_pretrained("vit_xs_4", wanted)


def test_a_file_is_taken_as_it_is(here):
    torch.save({}, "w.pth")
    assert find_pretrained("vit_xs_4", "w.pth").path == Path("w.pth")


def published(here: Path, monkeypatch, name: str) -> torch.nn.Module:
    """torchvision's network with random weights, whose file lies where it would be downloaded from."""
    torch.manual_seed(0)
    row = TORCHVISION[name]
    peer = torchvision.models.get_model(row.name, weights=None).eval()
    torch.save(peer.state_dict(), here / "w.pth")
    digits = hashlib.sha256((here / "w.pth").read_bytes()).hexdigest()[:8]
    (here / "w.pth").rename(here / f"{row.name}-{digits}.pth")
    (here / "model_data").mkdir()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(here / "torch"))
    url = (here / f"{row.name}-{digits}.pth").as_uri()
    monkeypatch.setattr("nets.pretrained.published_by_torchvision", lambda _: (url, {}))
    return peer


def test_torchvisions_weights_are_downloaded_once_and_checked(here, monkeypatch, capsys):
    peer = published(here, monkeypatch, "resnet18")
    found = find_pretrained("resnet18")
    assert found.path.parent == here / "torch" / "checkpoints"
    own = build_model("resnet18", 1000, (64, 64)).eval()
    load_weights(own, read_weights(found))
    pictures = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(own(pictures), peer(pictures), atol=1e-5, rtol=0)
    assert read_weights(found).origin["url"] == found.origin["url"]
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)
    assert find_pretrained("resnet18") == found
    found.path.write_bytes(found.path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="damaged: its SHA-256"):
        find_pretrained("resnet18")
    torch.save({}, "model_data/resnet18.pth")
    assert find_pretrained("resnet18").path == Path("model_data/resnet18.pth")


def test_torchvisions_weights_that_cannot_be_had(here, monkeypatch):
    published(here, monkeypatch, "resnet18")
    next(here.glob("resnet18-*.pth")).unlink()
    with pytest.raises(FileNotFoundError, match=r"put it at model_data.resnet18\.pth, or set pretrained=False"):
        find_pretrained("resnet18")


def test_a_download_that_is_something_else(here, monkeypatch):
    published(here, monkeypatch, "resnet18")
    wrong = here / "resnet18-00000000.pth"
    wrong.write_bytes(b"something else")
    with pytest.raises(FileNotFoundError, match="could not be fetched"):
        download_from_url(wrong.as_uri(), "")
    assert not list((here / "torch" / "checkpoints").iterdir())


@pytest.mark.parametrize("name", TORCHVISION)
def test_every_published_file_has_its_hash_in_its_name(name):
    url, expected = published_by_torchvision(name)
    assert re.search(r"-([0-9a-f]{8,})\.pth$", url)
    assert expected["image_mean"] == (0.485, 0.456, 0.406)
    assert expected["interpolation"] == ("bicubic" if "swin" in name else "bilinear")
    assert expected["eval_crop"] == pytest.approx(224 / 256 if "swin" not in name else expected["eval_crop"])


def test_the_layouts_names_are_all_there():
    layout = {"mobilenetv2", "vit_b_16", *(f"resnet{n}" for n in (18, 34, 50, 101, 152))}
    layout |= {f"vgg{n}{norm}" for n in (11, 13, 16) for norm in ("", "_bn")}
    layout |= {f"swin_transformer_{size}" for size in ("tiny", "small", "base")}
    assert layout <= set(BACKBONES)


def test_nothing_is_downloaded_on_import():
    assert not hasattr(nets.hub, "huggingface_hub")
