"""utils/system/digests.py: any change of an input or of the code changes the digest."""

import shutil
from pathlib import Path

import pytest

from utils.system import digests
from utils.system.digests import IMAGE_CODE, TRAINING_CODE, code_digest, digest


def test_digest_depends_on_content_order_and_boundaries_of_parts():
    assert len({digest(parts) for parts in (["a", "b"], ["ab"], [b"a", "c"], ["b", "a"], [])}) == 5


@pytest.mark.parametrize("packages", [IMAGE_CODE, TRAINING_CODE])
def test_code_digest_changes_with_exactly_the_modules_of_its_packages(tmp_path, monkeypatch, packages):
    for folder in ("nets", "utils"):
        shutil.copytree(digests.PROJECT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    compute = code_digest.__wrapped__  # without the cache
    before = compute(packages)
    monkeypatch.setattr(digests, "PROJECT", tmp_path)
    assert compute(packages) == before
    modules = [file for package in packages for file in (tmp_path / package).rglob("*.py")]
    assert {"seeds.py", "train_config.py", "transforms.py"} <= {file.name for file in modules}
    for file in modules:
        text = file.read_text(encoding="utf-8")
        file.write_text(f"{text}\n", encoding="utf-8")
        assert compute(packages) != before, file
        file.write_text(text, encoding="utf-8")
    Path(tmp_path, "utils/evaluation/report_files.py").write_text("")
    Path(tmp_path, "utils/inference/tta_views.py").write_text("")
    assert compute(packages) == before
    modules[0].rename(modules[0].with_name("renamed.py"))
    assert compute(packages) != before
