"""utils/digests.py: what was made from other things isn't taken for what these make."""

import pytest

from utils import digests
from utils.digests import PREPARING, TRAINING, code_digest, digest


def test_parts_are_told_apart():
    assert len({digest(parts) for parts in (["a", "b"], ["ab"], [b"a", "c"], ["b", "a"], [])}) == 5


@pytest.mark.parametrize("modules", [PREPARING, TRAINING])
def test_any_edit_counts_and_no_other_module(tmp_path, monkeypatch, modules):
    for folder in ("nets", "utils"):
        (tmp_path / folder).mkdir()
        for file in (digests.PROJECT / folder).glob("*.py"):
            (tmp_path / folder / file.name).write_bytes(file.read_bytes())
    compute = code_digest.__wrapped__  # not what was remembered
    before = compute(modules)
    monkeypatch.setattr(digests, "PROJECT", tmp_path)
    assert compute(modules) == before
    for name in ("nets/vit.py", f"utils/{modules[-1]}.py"):
        with (tmp_path / name).open("a") as file:
            file.write("\n")
        assert compute(modules) != before
        before = compute(modules)
    (tmp_path / "utils/report.py").write_text("")
    assert compute(modules) == before
