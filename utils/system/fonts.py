"""Fonts for class names in any script, in plots and on images."""

from __future__ import annotations

from functools import cache

from matplotlib import font_manager
from PIL import ImageFont

# matplotlib's default font lacks Chinese, Japanese and Korean; the first of these that is installed supplies them.
CJK_FONTS = ["Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Zen Hei", "Microsoft YaHei"]
CJK_FONTS += ["SimHei", "PingFang SC", "Hiragino Sans GB", "Yu Gothic", "Malgun Gothic"]


@cache
def font_families() -> list[str]:
    """Font families for plots: matplotlib's default, and a CJK font if one is installed."""
    installed = set(font_manager.get_font_names())
    return ["DejaVu Sans", *[name for name in CJK_FONTS if name in installed][:1]]


def label_font(text: str, size: int, width: int) -> ImageFont.FreeTypeFont:
    """A font for `text` of at most `size` pixels, smaller (down to 6) where `text` is wider than `width` pixels."""
    path = font_manager.findfont(font_families()[0 if text.isascii() else -1])
    while ImageFont.truetype(path, size).getlength(text) > width and size > 6:
        size -= 1
    return ImageFont.truetype(path, size)
