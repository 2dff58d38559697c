"""nets/weights/license.py: model cards as on the Hugging Face hub, and hostile ones."""

import pytest
import torch

from nets.factory import build_model
from nets.weights.license import MAX_LENGTH, clean_license, read_license, warning_of
from nets.weights.load import load_weights, read_weights
from nets.weights.pretrained import BUNDLED_WEIGHTS, find_pretrained


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        ("license: apache-2.0", "apache-2.0"),
        ("tags:\n- a\nlicense: 'MIT'\nlibrary_name: timm", "mit"),
        ("license: other\nlicense_name: dinov3-license\nlicense_link: https://x", "dinov3-license"),
        ("license: other", "other"),
        ("license:\n- mit\n- cc-by-nc-4.0\ntags:\n- x", "mit, cc-by-nc-4.0"),
        ("license: cc-by-4.0\nextra_gated_prompt: sign here", "cc-by-4.0, gated"),
        ("license: unknown", ""),
        ("tags:\n- license: mit", ""),
        ("license: \x1b[31m<b>mit", ""),  # not YAML
        ("license: [mit", ""),
        ("license: apache-2.0  # see LICENSE", "apache-2.0"),
        ("license: Some <b>Custom License", "some bcustom license"),
        (f"license: {'a' * 500}", "a" * MAX_LENGTH),
    ],
)
def test_license_of_a_card(here, front, expected):
    for newline in ("\n", "\r\n"):
        (here / "README.md").write_text(
            f"---\n{front}\n---\n# Network\nlicense: gpl".replace("\n", newline), newline=""
        )
        assert read_license(here / "README.md") == expected


@pytest.mark.parametrize("content", [b"", b"# license: mit", b"---\nlicense: mit", b"\xff\xfe---", b"---\n" * 99999])
def test_card_without_front_matter(here, content):
    (here / "README.md").write_bytes(content)
    assert read_license(here / "README.md") == ""
    assert read_license(here / "no.md") == ""


@pytest.mark.parametrize(
    ("license", "warning"),
    [
        ("apache-2.0", ""),
        ("mit", ""),
        ("bsd-3-clause", ""),
        ("cc-by-4.0", ""),
        ("cc-by-sa-4.0", ""),
        ("cc-by-nc-4.0", "commercial"),
        ("mit, cc-by-nc-sa-4.0", "commercial"),
        ("fair-noncommercial-research-license", "commercial"),
        ("dinov3-license", "terms of its own"),
        ("apple-amlr", "terms of its own"),
        ("apache-2.0, gated", "terms of its own"),
        ("", ""),
    ],
)
def test_warnings(license, warning):
    assert (warning in warning_of(license)) and bool(warning_of(license)) == bool(warning)


def test_no_license_is_longer_or_stranger_than_a_name():
    assert clean_license("MIT\n\x1b[0m`|<script>") == "mit0mscript"
    assert clean_license(None) == clean_license("None") == ""
    assert clean_license({"a": 1}) == "a 1"


def test_license_is_printed_and_passed_on_by_checkpoints(here, capsys):
    model = build_model("vit_of_the_tests", 3, (8, 8))
    content = {"weights": model.state_dict(), "model": model.arguments, "origin": {"license": "cc-by-nc-4.0"}}
    torch.save(content, "checkpoint.pth")
    weights = read_weights("checkpoint.pth")
    load_weights(model, weights)
    assert weights.origin["license"] == "cc-by-nc-4.0"
    output = capsys.readouterr().out
    assert "license: cc-by-nc-4.0\nwarning: this license doesn't allow commercial use\n" in output
    torch.save(model.state_dict(), "own.pth")
    load_weights(model, read_weights("own.pth"))
    output = capsys.readouterr().out
    assert "license: unknown: ask its author\n" in output
    assert "warning" not in output


def test_bundled_weights_have_the_license_of_the_project():
    assert find_pretrained("vit_xs_4", folder="nothing").origin == {"license": "mit"}
    assert BUNDLED_WEIGHTS.parents[1].joinpath("LICENSE").read_text(encoding="utf-8").startswith("MIT License")
