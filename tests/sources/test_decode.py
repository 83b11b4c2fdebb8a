import io
import struct
import subprocess
import sys
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from firstsight.sources import decode as module
from firstsight.sources.base import UnreadableImage
from firstsight.sources.decode import decode

FORMATS = {
    "jpeg": ("JPEG", ("RGB", "L", "CMYK")),
    "png": ("PNG", ("RGB", "L", "P", "RGBA", "LA", "1", "I;16")),
    "webp": ("WEBP", ("RGB", "RGBA")),
    "bmp": ("BMP", ("RGB", "L", "P", "1", "RGBA")),
    "gif": ("GIF", ("P", "L")),
    "tiff": ("TIFF", ("RGB", "L", "P", "RGBA", "LA", "1", "CMYK", "YCbCr", "LAB", "I;16")),
    "ppm": ("PPM", ("RGB", "L", "1")),
}
CASES = [(fmt, mode) for fmt, modes in FORMATS.values() for mode in modes]


def picture(height=37, width=53, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def encoded(image, fmt, **options):
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def in_mode(mode):
    image = Image.fromarray(picture())
    if mode == "I;16":
        return Image.fromarray(np.asarray(image)[..., 0].astype(np.uint16) * 256 + 77)
    if mode == "LAB":
        return Image.merge("LAB", image.split())
    image = image.convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(picture(seed=1)[..., 0]))
    return image


@pytest.mark.parametrize(("fmt", "mode"), CASES)
def test_every_mode_is_as_pillow_reads_it(fmt, mode):
    data = encoded(in_mode(mode), fmt)
    got = decode(data)
    assert got.dtype == np.uint8 and got.shape == (37, 53, 3) and got.flags.writeable
    if mode == "I;16":
        np.testing.assert_array_equal(got, np.repeat(picture()[..., :1], 3, -1))
    else:
        reference = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        np.testing.assert_array_equal(got, reference)


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 0}, {"quality": 30}])
def test_kinds_of_jpeg_are_equal_on_both_paths(options):
    data = encoded(Image.fromarray(picture(301, 203)), "JPEG", **options)
    assert module._plain_jpeg(data)
    np.testing.assert_array_equal(decode(data), module._by_pillow(data, lambda *_: 1)[0])


def test_an_rgb_jpeg_is_not_taken_for_ycbcr():
    data = encoded(Image.fromarray(picture()), "JPEG", keep_rgb=True, quality=95)
    assert np.abs(decode(data).astype(int) - picture()).mean() < 4
    # The same with components that are numbered: only Adobe's marker tells now.
    data = bytearray(data)
    frame, scan = data.index(b"\xff\xc0") + 10, data.index(b"\xff\xda") + 5
    for number in range(3):
        data[frame + 3 * number] = data[scan + 2 * number] = number + 1
    assert not module._plain_jpeg(bytes(data))
    assert np.abs(decode(bytes(data)).astype(int) - picture()).mean() < 4


def test_16_bits_in_colour_are_scaled():
    rgb = picture().astype(np.uint16) * 256 + 77
    data = cv2.imencode(".png", rgb[..., ::-1])[1].tobytes()
    np.testing.assert_array_equal(decode(data), picture())


def test_16_bit_pgm_and_floats_are_scaled():
    grey = picture()[..., 0]
    pgm = b"P5 53 37 65535\n" + (grey.astype(np.uint16) * 256 + 77).astype(">u2").tobytes()
    np.testing.assert_array_equal(decode(pgm)[..., 0], grey)
    unit = encoded(Image.fromarray((grey / 255).astype(np.float32)), "TIFF")
    np.testing.assert_array_equal(decode(unit)[..., 1], grey)


def test_an_animation_gives_its_first_frame():
    frames = [Image.fromarray(picture(seed=k)).quantize() for k in range(3)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decode(data), np.asarray(frames[0].convert("RGB")))


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations_come_out_upright(fmt, orientation):
    upright = picture(40, 64)
    undo = {  # how the camera held it: applying the EXIF operation to this gives `upright`
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    stored = Image.fromarray(np.ascontiguousarray(undo[orientation](upright)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(fmt, {})
    got = decode(encoded(stored, fmt, exif=exif, **options))
    assert got.shape == upright.shape
    assert np.abs(got.astype(int) - upright).mean() < 3


@pytest.mark.parametrize("by", [2, 4, 8])
def test_a_jpeg_comes_smaller_as_pillow_drafts_it(by):
    data, sizes = encoded(Image.fromarray(picture(333, 501)), "JPEG"), []
    got, times = module.reduced(data, lambda *size: sizes.append(size) or by)
    reference = Image.open(io.BytesIO(data))
    reference.draft("RGB", (501 // by, 333 // by))
    np.testing.assert_array_equal(got, np.asarray(reference))
    assert (times, sizes) == (by, [(501, 333)]) and got.shape[1] == -(-501 // by)
    with pytest.raises(UnreadableImage):
        module.reduced(data[: len(data) // 2], lambda *_: by)
    png, times = module.reduced(encoded(Image.fromarray(picture()), "PNG"), lambda *_: by)
    assert times == 1 and np.array_equal(png, picture())


@pytest.mark.parametrize(("size", "expected"), [((80, 48), 8), ((44, 84), 4), ((81, 48), 1)])
@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_turned_jpeg_comes_smaller_upright_in_its_place(orientation, size, expected):
    """Only by what divides its sides: pixels that are cut would else come first."""
    exif, asked = Image.Exif(), []
    exif[0x0112] = orientation
    smooth = cv2.resize(picture(5, 6), size, interpolation=cv2.INTER_CUBIC)
    data = encoded(Image.fromarray(smooth), "JPEG", exif=exif, quality=95, subsampling=0)
    got, by = module.reduced(data, lambda *size: asked.append(size) or 8)
    whole = decode(data)
    assert by == expected and asked == [whole.shape[1::-1]]
    height, width = got.shape[:2]
    assert (height * by, width * by) == whole.shape[:2]
    blocks = whole.reshape(height, by, width, by, 3).mean((1, 3))
    assert np.abs(got - blocks).mean() < 3


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0rubbish", b"Exif\0\0II*\0\xff\xff\xff\xff"])
def test_broken_exif_does_not_make_an_image_unreadable(exif):
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    for options in ({}, {"keep_rgb": True}):  # one for each path
        data = encoded(Image.fromarray(picture()), "JPEG", **options)
        assert decode(data[:2] + segment + data[2:]).shape == (37, 53, 3)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
def test_a_truncated_jpeg_is_refused_at_every_length(options):
    data = encoded(Image.fromarray(picture(120, 160)), "JPEG", quality=92, **options)
    whole = decode(data)
    for cut in (*range(0, len(data) - 40, 23), *range(len(data) - 40, len(data))):
        # OpenCV 4 would give a picture for these: they must not even get there.
        assert not module._plain_jpeg(data[:cut])
        try:
            got = decode(data[:cut])
        except UnreadableImage:
            continue
        # Only what lacks nothing but its end may pass, and then it is the whole picture.
        assert cut > len(data) - 40
        np.testing.assert_array_equal(got, whole)


def test_a_thumbnails_end_does_not_pass_for_the_end_of_the_photograph():
    thumbnail = encoded(Image.fromarray(picture(16, 16)), "JPEG")
    segment = b"Exif\0\0" + thumbnail
    photo = encoded(Image.fromarray(picture(120, 160)), "JPEG")
    head = b"\xff\xd8\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment
    assert decode(head + photo[2:]).shape == (120, 160, 3)
    with pytest.raises(UnreadableImage):
        decode(head)


def test_a_truncated_png_is_refused_at_every_length():
    data = encoded(Image.fromarray(picture(60, 80)), "PNG")
    for cut in range(0, len(data) - 16, 97):  # the last 12 bytes only say that it ends
        with pytest.raises(UnreadableImage):
            decode(data[:cut])


@pytest.mark.parametrize("fmt", ["WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_half_a_file_is_refused(fmt):
    data = encoded(Image.fromarray(picture(60, 80)), fmt)
    with pytest.raises(UnreadableImage):
        decode(data[: len(data) // 2])


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff", b"no image", b"\0" * 1000, b"P5 9999"])
def test_what_is_no_image_is_refused(data):
    with pytest.raises(UnreadableImage):
        decode(data)


def _huge_png():
    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def _huge_jpeg():
    data = bytearray(encoded(Image.fromarray(picture()), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", 60_000, 60_000)
    return bytes(data)


def _huge_ppm():
    return b"P6 60000 60000 255\n"


@pytest.mark.parametrize("make", [_huge_png, _huge_jpeg, _huge_ppm])
def test_enormous_dimensions_are_refused_by_the_header(make, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as many a library leaves it
    with pytest.raises(UnreadableImage, match=f"60000 x 60000 pixels; at most {module.MAX_PIXELS}"):
        decode(make())


def test_damaged_files_print_nothing(tmp_path):
    jpeg = encoded(Image.fromarray(picture(120, 160)), "JPEG")
    png = encoded(Image.fromarray(picture(120, 160)), "PNG")
    for number, data in enumerate(
        (jpeg[:900], png[:900], jpeg[:20], b"\xff\xd8\xff\xd9", b"GIF89a")
    ):
        (tmp_path / str(number)).write_bytes(data)
    script = (
        "import sys, pathlib\n"
        "from firstsight.sources.base import UnreadableImage\n"
        "from firstsight.sources.decode import decode\n"
        "for path in pathlib.Path(sys.argv[1]).iterdir():\n"
        "    try: decode(path.read_bytes())\n"
        "    except UnreadableImage: pass\n"
        "    else: sys.exit(3)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "")
