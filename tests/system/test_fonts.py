"""utils/system/fonts.py, with a font of one glyph that is installed after matplotlib has made its list."""

import shutil

import pytest
from fontTools.ttLib import TTFont
from matplotlib import font_manager

from utils.system import fonts


@pytest.fixture
def new_font(tmp_path, monkeypatch):
    """DejaVu Sans under the name of a Chinese font."""
    path = tmp_path / "new.ttf"
    shutil.copy(font_manager.findfont("DejaVu Sans"), path)
    font = TTFont(path)
    for record in font["name"].names:
        if record.nameID in (1, 4, 16):
            record.string = "SimHei"
    font.save(path)
    manager = font_manager.fontManager
    monkeypatch.setattr(manager, "ttflist", [entry for entry in manager.ttflist if entry.name not in fonts.CJK_FONTS])
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(path), str(tmp_path / "gone.ttf")])
    fonts.font_families.cache_clear()
    yield
    fonts.font_families.cache_clear()


def test_a_font_newer_than_the_list_of_matplotlib_is_found(new_font):
    assert fonts.font_families() == ["DejaVu Sans", "SimHei"]


def test_missing_characters_are_reported_once(new_font, monkeypatch, capsys):
    monkeypatch.setattr(fonts, "_warned", [])
    fonts.warn_about_glyphs(["dog", "Ελλάδα"])
    assert capsys.readouterr().out == ""
    fonts.warn_about_glyphs(["dog", "猫"])
    fonts.warn_about_glyphs(["犬"])
    output = capsys.readouterr().out
    assert "no installed font has the characters 猫, which are drawn as boxes" in output
    assert output.count("warning") == 1
