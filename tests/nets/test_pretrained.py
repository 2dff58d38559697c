"""nets/weights/pretrained.py and nets/weights/hub.py: downloads with the hub client from a local server; with torch."""

import hashlib
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from safetensors.torch import save

import nets.weights.hub
from nets.factory import BACKBONES, build_model
from nets.torchvision_networks import TORCHVISION, published_by_torchvision
from nets.weights.hub import WeightsFile, download_from_url, find_obstacle
from nets.weights.load import load_weights, read_weights
from nets.weights.pretrained import find_pretrained

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """A minimal hub: some/vit; some/old has pickled weights, some/liar a wrong hash, and some/thing no weights."""

    files: dict[str, bytes]

    def do_HEAD(self) -> None:
        match = re.fullmatch(r"/some/(vit|old|liar|thing)/resolve/(\w+)/([\w.]+)", self.path)
        known = match and match[2] in ("main", "v1", COMMIT)
        content = self.files.get(match[3]) if known else None
        missing = {"vit": "bin", "old": "safetensors", "liar": "bin", "thing": ("bin", "safetensors")}
        if content is None or match[3].endswith(missing[match[1]]):
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RevisionNotFound")
            self.send_header("X-Error-Message", "not found")
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        digest = hashlib.sha256(content + b"!" * (match[1] == "liar")).hexdigest()
        self.send_header("ETag", f'"{digest}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_GET = do_HEAD

    def log_message(self, *args: object) -> None:
        """Log nothing."""


@pytest.fixture(scope="module")
def hub():
    torch.manual_seed(0)
    state = build_model("vit_xs_4", 3, (8, 8)).state_dict()
    description = {"pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "crop_pct": 0.75}}
    torch.save(state, pickled := io.BytesIO())
    weights = {"model.safetensors": save(state), "pytorch_model.bin": pickled.getvalue()}
    card = b"---\nlicense: cc-by-nc-4.0\n---\n# A network"
    Hub.files = weights | {"config.json": json.dumps(description).encode(), "README.md": card}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


SCRIPT = """
import json, sys
from nets.weights.pretrained import find_pretrained
from nets.weights.load import read_weights
for name in sys.argv[1:]:
    try:
        found = read_weights(find_pretrained("vit_xs_4", name))
        answer = {"origin": dict(found.origin), "mean": found.preprocessing["image_mean"], "of": found.source}
    except (FileNotFoundError, ValueError) as error:
        answer = f"{type(error).__name__}: {error}"
    print(json.dumps(answer))
"""


def fetch(hub, folder: Path, *names: str, **environment: str) -> list:
    """Run `SCRIPT` for `names` in a new process, since the client reads the endpoint when it is imported."""
    endpoint = f"http://127.0.0.1:{hub.server_address[1]}"
    env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": "home", "PYTHONPATH": str(ROOT)} | environment
    command = [sys.executable, "-c", SCRIPT, *names]
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder, timeout=120)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def online(hub, tmp_path_factory) -> tuple[Path, list]:
    folder = tmp_path_factory.mktemp("online")
    return folder, fetch(hub, folder, "some/vit", "some/vit@v2", "some/thing", "some/liar", "some/old")


def test_origin_has_the_commit(online):
    _, (found, *_) = online
    file, digest = found["origin"]["file"], hashlib.sha256(Hub.files["model.safetensors"]).hexdigest()
    assert file.endswith(f"{COMMIT}/model.safetensors")
    expected = {"repository": "some/vit", "revision": COMMIT, "sha256": digest, "file": file}
    expected["license"] = "cc-by-nc-4.0"
    assert found == {"origin": expected, "mean": [0.1, 0.2, 0.3], "of": "timm's ViT"}


def test_errors_of_the_hub(online):
    _, (_, no_revision, no_weights, liar, _) = online
    assert "at revision v2: download from the Hugging Face hub failed" in no_revision
    assert "none of model.safetensors, pytorch_model.bin" in no_weights
    assert liar.startswith("ValueError: ")
    assert "differs from the hub's" in liar


def test_offline_uses_the_cache_or_is_an_error(hub, online):
    folder, _ = online
    names = ("some/vit", f"some/vit@{COMMIT}", "some/old", "some/other")
    *cached, other = fetch(hub, folder, *names, HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    assert [found["origin"]["revision"] for found in cached] == [COMMIT] * 3
    assert cached[2]["origin"]["file"].endswith("pytorch_model.bin")
    assert other.startswith("FileNotFoundError: weights of some/other: download from the Hugging Face hub failed")
    assert "to its path, e.g. model_data/other.safetensors" in other.replace(os.sep, "/")


@pytest.fixture
def silent_server():
    """The address of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_without_a_network_there_is_one_line_with_url_place_and_mirror(here, monkeypatch):
    """Without retries: the client's would take a minute for two file names."""
    import huggingface_hub

    requests = []
    session = SimpleNamespace(head=lambda url, timeout: requests.append(url) or [][timeout])
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: session)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(here / "cache"))
    with pytest.raises(FileNotFoundError) as error:
        find_pretrained("vit_s_16")
    url = "https://huggingface.co/timm/vit_small_patch16_224.augreg_in21k_ft_in1k/resolve/main/model.safetensors"
    assert requests == [url]
    message = str(error.value)
    assert "\n" not in message and "pretrained=False" not in message
    for part in (
        f"failed: {url} (list index",
        "model_data/vit_s_16.safetensors",
        "HF_ENDPOINT",
        "https://hf-mirror.com",
    ):
        assert part in message.replace(os.sep, "/")


def test_weights_at_hand_are_found_without_asking_a_server(here, monkeypatch):
    asked = []
    monkeypatch.setattr(nets.weights.hub, "find_obstacle", lambda request: asked.append(request) or "no network")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here / "hub"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(here / "torch"))
    for name in ("vit_s_16", "resnet18"):
        with pytest.raises(FileNotFoundError, match="it isn't in the cache"):
            find_pretrained(name, online=False)
    cached = here / "hub/models--timm--vit_small_patch16_224.augreg_in21k_ft_in1k"
    (file := cached / "snapshots" / COMMIT / "model.safetensors").parent.mkdir(parents=True)
    file.write_bytes(save({"head.bias": torch.zeros(3)}))
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text(COMMIT)
    assert find_pretrained("vit_s_16", online=False).path == file
    published(here, monkeypatch, "resnet18")
    (here / "torch/checkpoints").mkdir(parents=True, exist_ok=True)
    name = next(here.glob("resnet18-*.pth"))
    name.rename(here / "torch/checkpoints" / name.name)
    assert find_pretrained("resnet18", online=False).path.name == name.name
    assert not asked


def test_a_server_that_never_answers_is_left_in_time(silent_server, here, monkeypatch):
    monkeypatch.setattr(nets.weights.hub, "TIMEOUT", 0.05)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(here / "torch"))
    with pytest.raises(
        FileNotFoundError, match=r"^x-0123abcd\.pth: download from http.* failed \(.*(timed out|no ans)"
    ):
        download_from_url(f"{silent_server}/x-0123abcd.pth", "")


def test_a_name_whose_lookup_takes_long_is_left_in_time(monkeypatch):
    monkeypatch.setattr(nets.weights.hub, "TIMEOUT", 0.05)
    assert find_obstacle(lambda: threading.Event().wait(5)) == "no answer within 0.05 seconds"


@pytest.mark.parametrize(
    "wanted", ["no/such/file.pth", "no/file.pth", "model_data/x", "nothing.pth", "/x", "owner/", "../x"]
)
def test_neither_a_file_nor_a_repository(here, wanted):
    Path("model_data").mkdir(exist_ok=True)
    with pytest.raises(FileNotFoundError, match="no such file, and not a repository on the Hugging Face hub"):
        find_pretrained("vit_xs_4", wanted)


def test_license_of_timms_weights(here, monkeypatch):
    """From the repository's model card, else from timm."""
    for known, expected in (({"license": "mit"}, "mit"), ({}, "cc-by-nc-4.0")):
        found = WeightsFile(Path("w"), {"repository": "x", **known})
        monkeypatch.setattr("nets.weights.pretrained.download_from_hub", lambda *_, found=found: found)
        assert find_pretrained("timm/convnextv2_atto.fcmae").origin == {"repository": "x", "license": expected}


def test_a_file(here):
    torch.save({}, "w.pth")
    assert find_pretrained("vit_xs_4", "w.pth").path == Path("w.pth")


def published(here: Path, monkeypatch, name: str) -> torch.nn.Module:
    """Return torchvision's network with random weights, and publish its file at a local URL."""
    torch.manual_seed(0)
    row = TORCHVISION[name]
    peer = torchvision.models.get_model(row.name, weights=None).eval()
    torch.save(peer.state_dict(), here / "w.pth")
    digits = hashlib.sha256((here / "w.pth").read_bytes()).hexdigest()[:8]
    (here / "w.pth").rename(here / f"{row.name}-{digits}.pth")
    (here / "model_data").mkdir()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(here / "torch"))
    url = (here / f"{row.name}-{digits}.pth").as_uri()
    monkeypatch.setattr("nets.weights.pretrained.published_by_torchvision", lambda _: (url, {}))
    return peer


def test_torchvision_weights_are_downloaded_once_and_verified(here, monkeypatch, capsys):
    peer = published(here, monkeypatch, "resnet18")
    found = find_pretrained("resnet18")
    assert found.path.parent == here / "torch" / "checkpoints"
    own = build_model("resnet18", 1000, (64, 64)).eval()
    load_weights(own, read_weights(found))
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(own(images), peer(images), atol=1e-5, rtol=0)
    assert read_weights(found).origin["url"] == found.origin["url"]
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)
    assert find_pretrained("resnet18") == found
    found.path.write_bytes(found.path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="damaged: its SHA-256"):
        find_pretrained("resnet18")
    torch.save({}, "model_data/resnet18.pth")
    assert find_pretrained("resnet18").path == Path("model_data/resnet18.pth")


def test_torchvision_weights_that_cannot_be_downloaded(here, monkeypatch):
    published(here, monkeypatch, "resnet18")
    next(here.glob("resnet18-*.pth")).unlink()
    with pytest.raises(FileNotFoundError, match=r"put it at model_data.resnet18\.pth$"):
        find_pretrained("resnet18")


def test_download_with_a_wrong_hash(here, monkeypatch):
    published(here, monkeypatch, "resnet18")
    wrong = here / "resnet18-00000000.pth"
    wrong.write_bytes(b"something else")
    with pytest.raises(FileNotFoundError, match=r"download from .* failed"):
        download_from_url(wrong.as_uri(), "")
    assert not list((here / "torch" / "checkpoints").iterdir())


@pytest.mark.parametrize("name", TORCHVISION)
def test_every_published_file_has_its_hash_in_its_name(name):
    url, expected = published_by_torchvision(name)
    assert re.search(r"-([0-9a-f]{8,})\.pth$", url)
    assert expected["image_mean"] == (0.485, 0.456, 0.406)
    assert expected["interpolation"] == ("bicubic" if "swin" in name else "bilinear")
    assert expected["eval_crop"] == pytest.approx(224 / 256 if "swin" not in name else expected["eval_crop"])


def test_all_backbones_of_classification_pytorch_exist():
    layout = {"mobilenetv2", "vit_b_16", *(f"resnet{n}" for n in (18, 34, 50, 101, 152))}
    layout |= {f"vgg{n}{norm}" for n in (11, 13, 16) for norm in ("", "_bn")}
    layout |= {f"swin_transformer_{size}" for size in ("tiny", "small", "base")}
    assert layout <= set(BACKBONES)


def test_hub_client_is_not_imported_early():
    assert not hasattr(nets.weights.hub, "huggingface_hub")
