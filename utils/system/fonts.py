"""Class names in any script: fonts for plots and for labels on images."""

from __future__ import annotations

from functools import cache

from matplotlib import font_manager
from PIL import ImageFont

# matplotlib's own font has no Chinese, Japanese or Korean; the first of these that is installed steps in.
CJK_FONTS = ["Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Zen Hei", "Microsoft YaHei"]
CJK_FONTS += ["SimHei", "PingFang SC", "Hiragino Sans GB", "Yu Gothic", "Malgun Gothic"]


@cache
def font_families() -> list[str]:
    """The font families that plots draw with: matplotlib's own, then one that has what it lacks, if there is one."""
    installed = set(font_manager.get_font_names())
    return ["DejaVu Sans", *[name for name in CJK_FONTS if name in installed][:1]]


def label_font(text: str, size: int, width: int) -> ImageFont.FreeTypeFont:
    """A font that has the signs of `text`, at `size` pixels or as much less as makes it fit into `width` pixels."""
    family = font_families()[0 if text.isascii() else -1]
    path = font_manager.findfont(family)
    while ImageFont.truetype(path, size).getlength(text) > width and size > 6:
        size -= 1
    return ImageFont.truetype(path, size)
