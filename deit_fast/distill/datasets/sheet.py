"""A contact sheet: some images of each class, one class a row.

Names are drawn in matplotlib's DejaVu Sans where matplotlib is installed (extra "train"). Pillow's
own font has little but ASCII: with it other letters lose their accents, or become question marks.
"""

import unicodedata
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from deit_fast.images import Unreadable, convert

from ..checkpoints import write_atomically
from .image_set import ImageSet

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
ROWS = 100  # classes that are shown
_SIDE, _GAP, _NAME = 96, 4, 160  # pixels of an image, between two, and of a class's name


def contact_sheet(images: ImageSet, each: int = 8) -> Image.Image:
    """Draw a sheet.

    Args:
        images: The set. Of more than `ROWS` classes the first are shown.
        each: How many images of a class, spread evenly over it; unreadable ones are left out.
    """
    shown = images.classes[:ROWS]
    step = _SIDE + _GAP
    sheet = Image.new("RGB", (_NAME + each * step + _GAP, len(shown) * step + _GAP), "white")
    draw, (font, is_ascii) = ImageDraw.Draw(sheet), _font()
    for row, name in enumerate(shown):
        of_class = np.flatnonzero(images.labels == row)
        shown_name = _as_ascii(name) if is_ascii else name
        text = f"{shown_name[:24]}\n{len(of_class):,}"
        draw.text((_GAP, row * step + _SIDE // 3), text, "black", font)
        spread = np.unique(np.linspace(0, len(of_class) - 1, min(each, len(of_class))).astype(int))
        for column, i in enumerate(of_class[spread].tolist()):
            try:
                with images.stored(i) as stored:
                    stored.draft(None, (2 * _SIDE, 2 * _SIDE))
                    picture = convert(stored, "RGB")
            except Unreadable:
                continue
            small = ImageOps.pad(picture, (_SIDE, _SIDE), color="lightgrey")
            sheet.paste(small, (_NAME + column * step, _GAP + row * step))
    return sheet


def _font() -> tuple[ImageFont.ImageFont | ImageFont.FreeTypeFont, bool]:
    """A font, and whether it has ASCII only."""
    found = find_spec("matplotlib")
    if found is not None and found.origin is not None:
        path = Path(found.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if path.exists():
            return ImageFont.truetype(str(path), 11), False
    return ImageFont.load_default(), True


def _as_ascii(name: str) -> str:
    parts = unicodedata.normalize("NFKD", name)
    bare = "".join(part for part in parts if not unicodedata.combining(part))
    return bare.encode("ascii", "replace").decode()


def require_format(path: Path) -> None:
    """Check a sheet's name before anything else is done.

    Raises:
        ValueError: Its ending is none of `FORMATS`, or there is no such folder.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"--sheet: {path}, expected a name that ends in {', '.join(FORMATS)}")
    if not path.resolve().parent.is_dir():
        raise ValueError(f"--sheet: there is no folder {path.parent}")


def write(sheet: Image.Image, path: Path) -> None:
    """Write a sheet, whole or not at all.

    Raises:
        OSError: It can't be written.
    """
    kind = FORMATS[path.suffix.lower()]
    write_atomically(path, lambda file: sheet.save(file, kind))
