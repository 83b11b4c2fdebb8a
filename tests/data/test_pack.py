"""A packed file gives the pictures of its source, is whole or is not there, and goes on."""

import errno
import sys

import numpy as np
import pytest

from firstsight import cli, data, open_source
from firstsight.data import packing
from firstsight.errors import UserError
from firstsight.loader import Steps
from firstsight.order import Epochs
from firstsight.sources.packed import Packed
from firstsight.views import Views
from firstsight.views.apply import crop_resize, resize
from tests.sources.pictures import encoded
from tests.views.pictures import generated

SIZES = [(60, 40), (40, 60), (31, 30), (200, 100), (100, 200), (1, 300)]


@pytest.fixture
def photos(tmp_path):
    from PIL import Image

    for number, size in enumerate(SIZES):
        file = tmp_path / "photos" / ("ant" if number < 3 else "bee") / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(Image.fromarray(generated(number, *size)), "PNG"))
    return tmp_path / "photos"


def test_a_pack_is_the_same_source_with_smaller_pictures(photos, tmp_path):
    result = data.pack(str(photos), out=str(tmp_path / "a.pack"), side=60)
    assert (result["images"], result["skipped"], result["resumed"]) == (6, [], 0)
    packed, folder = open_source(str(tmp_path / "a.pack")), open_source(str(photos))
    assert isinstance(packed, Packed) and packed.fingerprint() == folder.fingerprint()
    assert packed.classes == ("ant", "bee") and packed.labels.tolist() == [0, 0, 0, 1, 1, 1]
    for i, (width, height) in enumerate(SIZES):
        pixels = packed.pixels(i)
        assert packed.full_size(i, pixels) == (width, height)
        if max(width, height) <= 60:
            assert np.array_equal(pixels, folder.pixels(i))
        else:
            small = resize(folder.pixels(i), pixels.shape[1], pixels.shape[0])
            assert max(pixels.shape) == 60 and np.array_equal(pixels, small)
        assert not packed.damaged(i)
    assert packed.pixels(5).shape == (60, 1, 3)


def test_jpeg_packs_are_near_their_source(photos, tmp_path):
    cli.main(["data", "pack", str(photos), "--out", str(tmp_path / "a.pack"), "--format", "jpeg"])
    packed, folder = open_source(str(tmp_path / "a.pack")), open_source(str(photos))
    for i in range(5):
        distance = packed.pixels(i).astype(float) - folder.pixels(i)
        assert np.abs(distance).mean() < 12  # grain and saturated boxes: hard for JPEG
        assert abs(distance.mean()) < 1


def test_views_of_a_pack_are_drawn_in_pixels_of_the_original(photos, tmp_path):
    data.pack(str(photos), out=str(tmp_path / "a.pack"), side=50)
    plain = Views(jitter=0, gray=0, blur=(0.0,), flip=0)

    def batch(spec):
        source = open_source(str(spec))
        order = Epochs(len(source), 6, 0)
        return source, Steps(
            source=source, views=plain, size=16, order=order, seed=0, rank=0, world=1
        ).batch(0)

    (_, original), (packed, small) = batch(photos), batch(tmp_path / "a.pack")
    for v in range(2):
        assert np.array_equal(original.crops[v], small.crops[v])
        for b, i in enumerate(small.index.tolist()):
            pixels = packed.pixels(i)
            full = np.array(packed.full_size(i, pixels))
            scale = np.tile(np.array([pixels.shape[1], pixels.shape[0]]) / full, 2)
            box = small.crops[v][b].numpy() * scale
            near = np.rint(box).astype(int)
            near[2:] = np.maximum(near[2:], near[:2] + 1)
            expected = crop_resize(pixels, near.tolist(), 16)
            assert np.array_equal(small.views[v][b].permute(1, 2, 0).numpy(), expected)


def test_a_full_disk_leaves_no_pack_and_the_next_call_goes_on(photos, tmp_path, monkeypatch):
    whole = tmp_path / "whole.pack"
    data.pack(str(photos), out=str(whole))
    target, made = tmp_path / "a.pack", packing._image
    calls = []

    def full(images, index, *rest):
        calls.append(index)
        if index == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return made(images, index, *rest)

    monkeypatch.setattr(packing, "_image", full)
    with pytest.raises(UserError, match=r"No space left.*run the same command again"):
        data.pack(str(photos), out=str(target), workers=1)
    assert not target.exists()
    part = tmp_path / ".a.pack.part"
    if part.stat().st_size < 30_000:  # nothing of the first chunk was written: write some of it
        part.write_bytes(whole.read_bytes()[:30_000])
    monkeypatch.setattr(packing, "_image", made)
    with pytest.raises(UserError, match="not a whole packed file"):
        Packed(part)
    result = data.pack(str(photos), out=str(target))
    assert 0 < result["resumed"] < 6 and not part.exists()
    assert target.read_bytes() == whole.read_bytes()


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of files there")
@pytest.mark.parametrize("room", [10, 30_000, -20])
def test_a_disk_that_fills_at_any_place(photos, tmp_path, room):
    """The kernel itself refuses to write on: in the head, among the images, in the last bytes."""
    import resource

    data.pack(str(photos), out=str(tmp_path / "whole.pack"))
    whole = (tmp_path / "whole.pack").read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room % len(whole), before[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*a\.pack \(.*make room"):
            data.pack(str(photos), out=str(tmp_path / "a.pack"), workers=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "a.pack").exists()
    with pytest.raises(UserError, match="not a whole packed file"):
        Packed(tmp_path / ".a.pack.part")
    resumed = data.pack(str(photos), out=str(tmp_path / "a.pack"))["resumed"]
    assert resumed > 0 or room == 10
    assert (tmp_path / "a.pack").read_bytes() == whole


@pytest.mark.parametrize("cut", [1, 100, 5_000, 20_000, 60_000])
def test_any_rest_of_an_interrupted_pack_is_gone_on_from(photos, tmp_path, cut):
    data.pack(str(photos), out=str(tmp_path / "whole.pack"))
    whole = (tmp_path / "whole.pack").read_bytes()
    (tmp_path / ".a.pack.part").write_bytes(whole[:-cut])
    data.pack(str(photos), out=str(tmp_path / "a.pack"))
    assert (tmp_path / "a.pack").read_bytes() == whole
    damaged = bytearray(whole[: len(whole) // 2])
    damaged[len(damaged) // 3] ^= 1
    (tmp_path / ".a.pack.part").write_bytes(damaged)
    data.pack(str(photos), out=str(tmp_path / "a.pack"))
    assert (tmp_path / "a.pack").read_bytes() == whole


def test_other_settings_begin_anew(photos, tmp_path):
    data.pack(str(photos), out=str(tmp_path / "small.pack"), side=20)
    part = tmp_path / ".a.pack.part"
    part.write_bytes((tmp_path / "small.pack").read_bytes()[:-200])
    assert data.pack(str(photos), out=str(tmp_path / "a.pack"), side=30)["resumed"] == 0
    assert max(open_source(str(tmp_path / "a.pack")).pixels(3).shape) == 30


def test_unreadable_images_are_left_out_by_name(photos, tmp_path, capsys):
    (photos / "ant" / "1.png").write_bytes(b"no image")
    result = data.pack(str(photos), out=str(tmp_path / "a.pack"))
    assert result["skipped"] == ["ant/1.png"] and "left out ant/1.png" in capsys.readouterr().err
    packed = open_source(str(tmp_path / "a.pack"))
    assert packed.labels.tolist() == [0, 0, 1, 1, 1]
    assert packed.full_size(1, packed.pixels(1)) == SIZES[2]


def test_a_pack_that_changes_under_its_reader_is_refused(photos, tmp_path):
    file = tmp_path / "a.pack"
    data.pack(str(photos), out=str(file))
    packed = open_source(str(file))
    packed.pixels(0)
    with open(file, "r+b") as handle:
        handle.truncate(1000)
    with pytest.raises(UserError, match="has changed since it was opened"):
        packed.pixels(4)
    with pytest.raises(UserError, match="not a whole packed file"):
        open_source(str(file))
