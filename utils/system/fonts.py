"""Fonts for class names in any script, in plots and on images."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cache

from matplotlib import font_manager
from PIL import ImageFont

# matplotlib's default font lacks Chinese, Japanese and Korean; the first of these that is installed supplies them.
CJK_FONTS = ["Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Zen Hei", "Microsoft YaHei"]
CJK_FONTS += ["SimHei", "PingFang SC", "Hiragino Sans GB", "Yu Gothic", "Malgun Gothic"]


@cache
def font_families() -> list[str]:
    """Font families for plots: matplotlib's default, and a CJK font if one is installed."""
    _add_new_fonts()
    installed = set(font_manager.get_font_names())
    return ["DejaVu Sans", *[name for name in CJK_FONTS if name in installed][:1]]


def _add_new_fonts() -> None:
    """Make the fonts known to matplotlib that were installed after it last made its list."""
    known = {os.path.realpath(entry.fname) for entry in font_manager.fontManager.ttflist}
    for path in font_manager.findSystemFonts():
        if os.path.realpath(path) not in known:
            try:
                font_manager.fontManager.addfont(path)
            except (OSError, RuntimeError, ValueError, KeyError):  # no scalable font, or a damaged one
                continue


def warn_about_glyphs(texts: Iterable[str]) -> None:
    """Print a warning, once, if no font for plots has all characters of `texts`, which are then drawn as boxes."""
    families = font_families()
    glyphs = set().union(*(font_manager.get_font(font_manager.findfont(name)).get_charmap() for name in families))
    missing = {char for char in "".join(texts) if char.isprintable() and ord(char) not in glyphs}
    if missing and not _warned:
        _warned.append(True)
        shown = "".join(sorted(missing)[:10])
        print(
            f"warning: no installed font has the characters {shown}, which are drawn as boxes: install one, such as "
            f"Noto Sans CJK for Chinese, Japanese and Korean"
        )


_warned: list[bool] = []


def label_font(text: str, size: int, width: int) -> ImageFont.FreeTypeFont:
    """A font for `text` of at most `size` pixels, smaller (down to 6) where `text` is wider than `width` pixels."""
    warn_about_glyphs([text])
    path = font_manager.findfont(font_families()[0 if text.isascii() else -1])
    while ImageFont.truetype(path, size).getlength(text) > width and size > 6:
        size -= 1
    return ImageFont.truetype(path, size)
