"""What is told about a source is so: counted by hand on sources made for it."""

import json
import os

import cv2
import numpy as np
import pytest
from PIL import Image

from firstsight import cli, data
from firstsight.data.looked import NEAR, _bits, alike, difference_hash, recommended
from tests.sources.pictures import encoded


def smooth(seed, width=80, height=60):
    picture = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_CUBIC)


@pytest.fixture
def photos(tmp_path):
    pictures = {
        "cat/a.png": encoded(Image.fromarray(smooth(0)), "PNG"),
        "cat/b.png": encoded(Image.fromarray(smooth(0)), "PNG"),  # the same file
        "cat/c.jpg": encoded(Image.fromarray(smooth(0, 160, 120)), "JPEG"),  # looks the same
        "dog/d.png": encoded(Image.fromarray(smooth(1, 40, 200)).convert("L"), "PNG"),
        "dog/e.png": b"no image",
        "dog/f.png": encoded(Image.new("RGBA", (30, 30), (5, 5, 5, 9)), "PNG"),
        "dog/g.png": encoded(Image.new("P", (30, 30), 3), "PNG"),  # as flat as the one before
    }
    for name, content in pictures.items():
        file = tmp_path / "photos" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    with open(os.fsencode(tmp_path / "photos" / "dog") + b"/\xff.png", "wb") as file:
        file.write(b"no image either")
    return tmp_path / "photos"


def test_everything_is_counted(photos):
    told = data.info(str(photos), workers=1)
    assert told["images"] == 8 and told["labels"] == {"cat": 3, "dog": 5}
    assert [one["image"] for one in told["unreadable"]] == ["dog/e.png", "dog/\\xff.png"]
    assert told["width"] == {"min": 30, "median": 60, "max": 160}
    assert told["height"] == {"min": 30, "median": 60, "max": 200}
    assert told["modes"] == {"RGB": 3, "L": 1, "RGBA": 1, "P": 1}
    assert told["exact_duplicates"] == [["cat/a.png", "cat/b.png"]]
    assert told["near_duplicates"] == [["cat/a.png", "cat/c.jpg"]]
    sizes = [file.stat().st_size for file in photos.rglob("*.*") if file.name[0] not in "e\udcff"]
    assert told["bytes"] == sum(sizes) and told["decoded_per_second"] > 0
    assert told["recommended"]["--max-bad"] == "0.25" and told["recommended"]["--size"] == "32"


def test_the_hash_is_of_brighter_neighbours():
    """By plain loops on a picture of 9 x 8 pixels, where nothing is resized."""
    grey = np.random.default_rng(3).integers(0, 256, (8, 9), dtype=np.uint8)
    expected = 0
    for row in range(8):
        for column in range(8):
            expected = expected * 2 + int(int(grey[row, column + 1]) > int(grey[row, column]))
    assert difference_hash(np.stack([grey] * 3, -1)) == expected
    assert difference_hash(np.full((40, 40, 3), 99, np.uint8)) is None


def test_groups_are_those_of_all_pairs():
    """Against every pair, in small and in large buckets."""
    generator = np.random.default_rng(0)
    hashes = []
    for index in range(300):
        value = int(generator.integers(0, 1 << 63))
        if index % 3:  # a few bits away from an earlier one; some share their lowest parts
            value = hashes[int(generator.integers(0, index))][1]
            for bit in generator.integers(0, 64, int(generator.integers(0, 6))):
                value ^= 1 << int(bit)
        hashes.append((index, value))
    reach = {i: {i} for i, _ in hashes}
    for i, a in hashes:
        for j, b in hashes:
            if bin(a ^ b).count("1") <= NEAR and reach[i] is not reach[j]:
                reach[i] |= reach[j]
                for k in reach[j]:
                    reach[k] = reach[i]
    expected = {tuple(sorted(group)) for group in reach.values() if len(group) > 1}
    assert {tuple(group) for group in alike(hashes)} == expected and len(expected) > 5
    values = np.array([0, 1, 255, (1 << 64) - 1], np.uint64)
    assert _bits(values).tolist() == [0, 1, 8, 64]


def test_settings_fit_the_source():
    def flags(images, side, size=10**6, bad=0):
        spread = {"min": side, "median": side, "max": side}
        return recommended(
            {"images": images, "unreadable": [0] * bad, "bytes": size, "width": spread,
             "height": spread}, True)  # fmt: skip

    assert flags(10**6, 400, 10**11) == {"--size": "224", "--batch-size": "256"}
    small = {"--size": "64", "--batch-size": "64", "--stem": "small", "--backbone": "resnet18"}
    assert flags(100, 80) == {**small, "--cache": "shared"}
    assert flags(1, 300) == {} and flags(1000, 300, bad=3)["--max-bad"] == "0.003"


def test_the_command(photos, tmp_path, capsys):
    cli.main(["data", "info", str(photos), "--json", str(tmp_path / "r.json")])
    shown = capsys.readouterr().out
    assert "cannot be read" in shown and "\\xff.png" in shown and "--max-bad 0.25" in shown
    assert json.loads((tmp_path / "r.json").read_text())["images"] == 8
    cli.main(["data", "info", "scenes:train@8"])
    assert "scenes:train@8" in capsys.readouterr().out
