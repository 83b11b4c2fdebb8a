"""What images are called where they are written anew, and the bytes that are written."""

from __future__ import annotations

from firstsight.errors import UserError
from firstsight.log import printable
from firstsight.sources.base import Encoded, Source
from firstsight.sources.paths import has_extension


def encoded(source: Source, index: int) -> bytes:
    """The file of image `index` as it is, or its pixels as PNG; raises `UnreadableImage`."""
    if isinstance(source, Encoded):
        return source.encoded(index)
    import cv2

    pixels = cv2.cvtColor(source.pixels(index), cv2.COLOR_RGB2BGR)
    return bytes(cv2.imencode(".png", pixels)[1])


def names_inside(source: Source) -> list[str]:
    """Relative paths for all images that stay below any folder, each another one.

    The identities of the source, without what is absolute, climbs or is hidden; bytes that are no
    UTF-8 are spelt out.
    """
    first: dict[str, str] = {}
    for index in range(len(source)):
        identity = source.identity(index)
        parts = [part.lstrip(".") for part in printable(identity).split("/")]
        name = "/".join(part for part in parts if part)
        if not has_extension(name):  # sources in memory number their images
            name += ".png"
        if name in first:
            raise UserError(
                f"{identity!r} and {first[name]!r} of {source.spec} would both be called "
                f"{name!r}; rename one"
            )
        first[name] = identity
    return list(first)
