"""Bytes of an image file -> upright RGB pixels, or `UnreadableImage`; never half an image.

OpenCV decodes the common JPEG about a third faster than Pillow, but its version 4 is careless: it
returns a truncated file as a picture that is grey below the cut. So a JPEG takes the fast path only
when its header shows one of the plain kinds and its end marker is there. Everything else goes
through Pillow, which refuses what is cut short.

Both leave a JPEG's fine frequencies out where a smaller picture is enough (`reduced`).
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from firstsight.sources.base import Pixels, UnreadableImage

MAX_PIXELS = 178_956_970
"""Larger images are refused by their header (half a GiB of RGB; Pillow's own limit)."""

# One damaged file among a million must not write over a progress bar.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
# Pillow warns from half of our limit on, once for each place; the limit itself is enforced here.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", message="Corrupt EXIF data", category=UserWarning)

_PLAIN_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive, all Huffman-coded
_APP1, _APP14, _SCAN = 0xE1, 0xEE, 0xDA
_REDUCED = {  # OpenCV's names speak of grey; beside COLOR_RGB they say the size alone
    1: 0,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}

Shrink = Callable[[int, int], int]
"""Width and height of an upright image -> how many times smaller it may come: 1, 2, 4 or 8."""


def decode(data: bytes) -> Pixels:
    """The image in `data`, upright (EXIF orientation applied), RGB, (H, W, 3) uint8.

    Alpha is dropped, palettes are looked up, CMYK is converted, 16-bit values keep their high byte,
    floats are taken as 0 to 1 (as 0 to 255 where one exceeds 1), and an animation gives its first
    frame.

    Raises `UnreadableImage` where `data` is no image, is cut short, or declares more than
    `MAX_PIXELS` pixels.
    """
    return reduced(data, lambda width, height: 1)[0]


def reduced(data: bytes, shrink: Shrink) -> tuple[Pixels, int]:
    """The image in `data` as `decode` has it, or so many times smaller, and how many times.

    Only JPEGs come smaller, by at most what `shrink` says: then pixel (x, y) shows the k x k pixels
    from (k x, k y) on, and sides that k does not divide are rounded up. The decoder reads all of
    the file, and of each block only the low frequencies.
    """
    try:
        if size := _plain_jpeg(data):
            by = shrink(*size)
            pixels = cv2.imdecode(
                np.frombuffer(data, np.uint8),
                cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION | _REDUCED[by],
            )
            if pixels is not None:
                return np.asarray(pixels, np.uint8), by
        return _by_pillow(data, shrink)
    except UnreadableImage:
        raise
    except Exception as error:  # decoders raise anything, from struct.error to SyntaxError
        raise UnreadableImage(f"{type(error).__name__}: {error}") from error


def sizes(path: str | os.PathLike[str]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Width and height of a file's image as it is stored, and upright; reads its header only.

    Raises `UnreadableImage` where there is no such file, or it is no image.
    """
    try:
        with Image.open(path) as image:
            _refuse_huge(*image.size)
            width, height = image.size
            on_its_side = _orientation(image) >= 5
    except UnreadableImage:
        raise
    except Exception as error:  # as above
        raise UnreadableImage(f"{type(error).__name__}: {error}") from error
    return (width, height), (height, width) if on_its_side else (width, height)


def _plain_jpeg(data: bytes) -> tuple[int, int] | None:
    """Width and height of a whole JPEG, upright, grey or YCbCr: what OpenCV decodes like Pillow."""
    if data[:3] != b"\xff\xd8\xff" or not data[-64:].rstrip(b"\0\r\n").endswith(b"\xff\xd9"):
        return None
    at, size, metadata = 2, None, False
    while at + 10 <= len(data):
        if data[at] != 0xFF:
            return None
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == _SCAN:
            # An end marker counts only behind a scan: thumbnails inside the header have one too.
            return size if not metadata or _is_upright(data) else None
        if marker in _PLAIN_FRAMES:
            depth, components = data[at + 4], data[at + 9]
            height = int.from_bytes(data[at + 5 : at + 7], "big")
            width = int.from_bytes(data[at + 7 : at + 9], "big")
            _refuse_huge(width, height)
            size = (width, height) if depth == 8 and components in (1, 3) and height > 0 else None
            if data[at + 10 : at + 11] == b"R":  # components named R, G, B are not YCbCr
                return None
        elif marker == _APP1:
            metadata = True
        elif marker == _APP14 and data[at + 4 : at + 9] == b"Adobe" and data[at + 15] != 1:
            return None  # Adobe's RGB and CMYK
        at += 2 + length
    return None


def _is_upright(data: bytes) -> bool:
    with Image.open(io.BytesIO(data)) as image:
        return _orientation(image) == 1


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # unreadable metadata do not make the picture unreadable
        return 1


def _refuse_huge(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UnreadableImage(f"{width} x {height} pixels; at most {MAX_PIXELS} are decoded")


def _by_pillow(data: bytes, shrink: Shrink) -> tuple[Pixels, int]:
    with Image.open(io.BytesIO(data)) as file:
        _refuse_huge(*file.size)
        turned = _orientation(file)
        by = _drafted(file, shrink, turned) if file.format in ("JPEG", "MPO") else 1
        file.load()
        image = ImageOps.exif_transpose(file) if turned != 1 else file.copy()
    if image.mode.startswith("I") or image.mode == "F":  # convert("RGB") would clip these
        image = Image.fromarray(_to_8_bits(np.asarray(image)))
    return np.array(image.convert("RGB"), np.uint8), by


def _drafted(file: Image.Image, shrink: Shrink, turned: int) -> int:
    """Have Pillow decode a JPEG smaller where `shrink` allows it; how many times."""
    width, height = file.size
    by = shrink(height, width) if turned >= 5 else shrink(width, height)
    while width % by or height % by:  # turned round, a part of a pixel would come first
        by //= 2
    file.draft(None, (width // by, height // by))
    return by if file.size == (width // by, height // by) else 1


def _to_8_bits(grey: NDArray[Any]) -> Pixels:
    """Grey values of 16 or 32 bits or floats, over the range of their kind -> 0 to 255."""
    if grey.dtype.kind == "f":
        top = 1.0 if np.nanmax(grey) <= 1 else 255.0
        unit = np.nan_to_num(np.asarray(grey / top)).clip(0, 1)
        return np.asarray(np.rint(unit * 255), np.uint8)
    # Pillow holds 16 bits in 32-bit integers for some formats, so the values have to tell.
    shift = 8 if int(grey.max()) < 1 << 16 else 24
    return np.asarray(grey.clip(0) >> shift, np.uint8)
