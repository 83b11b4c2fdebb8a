"""Small images that the tests of sources make for themselves."""

import io

import numpy as np
from PIL import Image


def flat(value=0, size=(8, 6)):
    """A picture of one grey: what identifies it survives every codec."""
    return Image.new("RGB", size, (value, value, value))


def encoded(image, fmt, **options):
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def png(value=0):
    return encoded(flat(value), "PNG")


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
