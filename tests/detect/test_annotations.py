"""Each kind of annotation file, and each way in which it can be wrong."""

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from firstsight.detect.annotations import open_annotated
from firstsight.errors import UserError
from firstsight.sources.base import UnreadableImage

DATA = Path(__file__).resolve().parents[3] / "shared/data"


@pytest.fixture
def photos(tmp_path):
    """a.png, b.png and c.png, 40 wide and 30 high."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in "abc":
        cv2.imwrite(str(folder / f"{name}.png"), np.zeros((30, 40, 3), np.uint8))
    return folder


def coco(folder, annotations, **values):
    """Three images with ids 10, 20, 30; categories 3 and 90."""
    rows = [
        {"id": 10 * (i + 1), "file_name": f"{name}.png", "width": 40, "height": 30}
        for i, name in enumerate("abc")
    ]
    data = {"images": rows, "categories": [{"id": 90, "name": "cup"}, {"id": 3, "name": "car"}]}
    data["annotations"] = [{"id": i + 1, **one} for i, one in enumerate(annotations)]
    file = folder.parent / "instances.json"
    file.write_text(json.dumps(data | values))
    return str(file)


def box(x, y, width, height, image=10, category=3, **values):
    return {"image_id": image, "bbox": [x, y, width, height], "category_id": category, **values}


def opened(folder, file, **values):
    return open_annotated(str(folder), str(file), **values)


def faults(one):
    return {kind: fault.count for kind, fault in one.faults.items()}


def test_coco_boxes_categories_and_empty_images(photos):
    file = coco(photos, [box(1.5, 2, 10, 20, area=150.0), box(5, 5, 5, 5, category=90, image=30)])
    one = opened(photos, file)
    assert one.categories == ("car", "cup") and one.category_ids == (3, 90)
    assert [p.name for p in one.pictures] == ["a.png", "b.png", "c.png"]
    assert [p.image_id for p in one.pictures] == [10, 20, 30] and len(one) == 3
    a, b, c = (p.objects for p in one.pictures)
    assert a.boxes.tolist() == [[1.5, 2, 11.5, 22]] and a.boxes.dtype == np.float32
    assert (a.labels.tolist(), a.area.tolist(), a.crowd.tolist()) == ([0], [150], [False])
    assert b.boxes.shape == (0, 4) and len(b) == 0 and b.masks == ()
    assert (c.labels.tolist(), c.area.tolist()) == ([1], [25])
    assert (one.pictures[0].width, one.pictures[0].height) == (40, 30)
    assert one.pixels(0).shape == (30, 40, 3) and one.told() == [] and not one.has_masks
    with pytest.raises(UserError, match="no masks"):
        one.bitmaps(0)


def test_coco_masks_are_polygons_and_run_lengths(photos):
    crowd = {"size": [30, 40], "counts": [30, 60, 30 * 37]}
    rows = [
        box(2, 3, 8, 5, segmentation=[[2, 3, 10, 3, 10, 8, 2, 8]]),
        box(1, 0, 2, 30, segmentation=crowd, iscrowd=1),
        box(0, 0, 1, 1, segmentation={"size": [30, 40], "counts": "0d7"[:0]}, image=20),
    ]
    one = opened(photos, coco(photos, rows[:2]))
    assert one.pictures[0].objects.crowd.tolist() == [False, True] and one.has_masks
    bitmaps = one.bitmaps(0)
    expected = np.zeros((2, 30, 40), bool)
    expected[0, 3:8, 2:10] = True
    expected[1, :, 1:3] = True
    assert (bitmaps == expected).all() and one.bitmaps(1).shape == (0, 30, 40)
    assert not opened(photos, coco(photos, rows[:2]), masks=False).has_masks


def test_ids_of_images_may_be_text(photos):
    rows = [{"id": name, "file_name": f"{name}.png", "width": 40, "height": 30} for name in "ab"]
    one = opened(photos, coco(photos, [box(1, 1, 9, 9, image="b")], images=rows))
    assert [p.image_id for p in one.pictures] == ["a", "b"] and len(one.pictures[1].objects) == 1
    # and numbers written as text mean the same image
    one = opened(photos, coco(photos, [box(1, 1, 9, 9, image="20", category="3")]))
    assert [len(p.objects) for p in one.pictures] == [0, 1, 0]


def test_each_fault_is_counted_named_and_left_out(photos):
    bad = [
        box(50, 3, 8, 8),  # beside the image
        box(5, 5, 0, 9),
        box(5, 5, 9, -1),
        box(5, 5, 9, 9, category=7),
        box(5, 5, 9, 9, image=70),
        {"image_id": 10, "category_id": 3},
        box("x", 5, 9, 9),
        box(5, 5, float("nan"), 9),
        box(30, 20, 20, 20),  # cut, not left out
        box(-0.4, 0, 9, 30.6),  # rounded
    ]
    one = opened(photos, coco(photos, bad), max_bad=0.9)
    assert faults(one) == {
        "boxes outside the image": 1,
        "boxes without area": 2,
        "objects of an unknown category": 1,
        "annotations of images that are not listed": 1,
        "boxes that are no four numbers": 3,
        "boxes cut at the edge of the image": 1,
        "categories without an object": 1,
    }
    kept = one.pictures[0].objects.boxes
    assert np.allclose(kept, [[30, 20, 40, 30], [-0.4, 0, 8.6, 30.6]])
    said = "\n".join(one.told())
    assert "annotation 1 of a.png (50, 3, 58, 11 in 40 x 30)" in said
    assert "annotation 4 of a.png (category 7)" in said and "1 categories" in said and "cup" in said
    with pytest.raises(UserError, match=r"8 of 10 objects cannot be used .*first annotation"):
        opened(photos, coco(photos, bad))


def test_masks_that_do_not_fit_are_counted(photos):
    whole = [[2, 3, 10, 3, 10, 8, 2, 8]]
    rows = [
        box(2, 3, 8, 5, segmentation=whole),
        box(2, 3, 8, 5, segmentation={"size": [40, 30], "counts": [1200]}),
        box(2, 3, 8, 5, segmentation=[[1, 2, 3, 4]]),
        box(2, 3, 8, 5, segmentation=[]),
    ]
    one = opened(photos, coco(photos, rows), max_bad=0.9)
    assert faults(one)["masks that do not fit the image or cannot be read"] == 2
    assert faults(one)["objects without a mask among others with one"] == 1
    assert len(one.pictures[0].objects) == len(one.pictures[0].objects.masks) == 1
    assert "of size [40, 30] for an image of [30, 40]" in "".join(one.told())


def test_images_missing_damaged_listed_twice_or_of_another_size(photos):
    (photos / "b.png").write_bytes(b"no image")
    rows = [
        {"id": 10, "file_name": "a.png", "width": 41, "height": 30},
        {"id": 20, "file_name": "b.png"},
        {"id": 30, "file_name": "c.png"},
        {"id": 30, "file_name": "c.png"},
        {"id": 40, "file_name": "d.png"},
    ]
    file = coco(photos, [box(1, 1, 9, 9, image=30)], images=rows)
    one = opened(photos, file, max_bad=0.9)
    assert [p.name for p in one.pictures] == ["c.png"]
    assert "a.png (41 x 30, but is 40 x 30)" in "".join(one.told())
    assert {kind: count for kind, count in faults(one).items() if "images" in kind} == {
        "images listed twice": 1,
        "images missing": 1,
        "images unreadable": 1,
        "images of another size than stated": 1,
    }
    with pytest.raises(UserError, match=r"4 of 5 images cannot be used .*--max-bad"):
        opened(photos, file)
    os.remove(photos / "c.png")
    with pytest.raises(UnreadableImage):
        one.pixels(0)


def test_the_annotations_of_another_set_are_refused(photos, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    cv2.imwrite(str(other / "z.png"), np.zeros((9, 9, 3), np.uint8))
    with pytest.raises(UserError, match=r"3 of 3 images cannot be used .*missing, first a\.png"):
        opened(other, coco(photos, [box(1, 1, 9, 9)]), max_bad=1)


def test_an_image_turned_by_its_exif_is_measured_upright(photos):
    image = Image.fromarray(np.zeros((30, 40, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    image.save(photos / "t.jpg", exif=exif)
    for size, there in (((30, 40), 1), ((40, 30), 0)):
        rows = [{"id": 1, "file_name": "t.jpg", "width": size[0], "height": size[1]},
                {"id": 2, "file_name": "a.png"}]  # fmt: skip
        file = coco(photos, [box(1, 1, 9, 9, image=1), box(1, 1, 9, 9, image=2)], images=rows)
        one = opened(photos, file, max_bad=0.9)
        assert len(one) == 1 + there
        if there:
            assert one.pixels(0).shape == (40, 30, 3) and one.pictures[0].height == 40
        else:
            assert "turned by its EXIF" in "".join(one.told())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot read annotations"),
        ("[]", "no lists of images"),
        ('{"images": []}', "no lists of images"),
        ('{"images": [], "annotations": [], "categories": []}', "names no category"),
        ('{"images": [{}], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "'id'"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1}]}', "'name' is missing"),
        ('{"images": [3], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "cannot"),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, '
            '{"id": 1, "name": "b"}]}',
            "two categories with the id 1",
        ),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "no images"),
        ("hello", "of no known kind"),
        ("", "of no known kind"),
    ],
)
def test_a_file_that_is_no_annotations_is_one_sentence(photos, text, said):
    file = photos.parent / "file.json"
    file.write_text(text)
    with pytest.raises(UserError, match=said):
        opened(photos, file)


def test_what_is_not_there_is_one_sentence(photos, tmp_path):
    with pytest.raises(UserError, match="there is no"):
        opened(photos, tmp_path / "none.json")
    with pytest.raises(UserError, match="of no known kind"):
        opened(photos, photos)
    with pytest.raises(UserError, match="not a folder"):
        opened(tmp_path / "none", coco(photos, [box(1, 1, 9, 9)]))
    with pytest.raises(UserError, match="marks no objects"):
        opened(photos, coco(photos, []))


# Pascal VOC


def voc(folder, name, *things, filename=None, size=(40, 30)):
    rows = "".join(
        f"<object><name>{label}</name><difficult>{hard}</difficult><bndbox><xmin>{x1}</xmin>"
        f"<ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for label, hard, x1, y1, x2, y2 in things
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.xml").write_text(
        f"<annotation><filename>{filename or name + '.png'}</filename><size><width>{size[0]}"
        f"</width><height>{size[1]}</height></size>{rows}</annotation>"
    )


def test_voc_counts_from_1_and_includes_the_last_pixel(photos, tmp_path):
    folder = tmp_path / "VOC/Annotations"
    voc(folder, "a", ("cat", 0, 1, 1, 40, 30), ("dog", 1, 3, 4, 12, 9))
    voc(folder, "b", filename="renamed.png")
    one = opened(photos, folder)
    assert len(one.categories) == 20 and one.categories[7] == "cat"  # VOC's own order
    a = one.pictures[0].objects
    assert a.boxes.tolist() == [[0, 0, 40, 30], [2, 3, 12, 9]]
    assert (a.labels.tolist(), a.difficult.tolist()) == ([7, 11], [False, True])
    assert not a.crowd.any() and a.area.tolist() == [1200, 60]
    assert one.pictures[1].name == "b.png" and len(one.pictures[1].objects) == 0


def test_voc_other_names_and_faults(photos, tmp_path):
    folder = tmp_path / "xml"
    voc(folder, "a", ("zebu", 0, 3, 3, 3, 9), ("ant", 0, 3, 3, 9, 9), ("ant", 0, "x", 3, 9, 9))
    voc(folder, "b", ("ant", 0, 3, 3, 45, 9))
    voc(folder, "c", ("ant", 0, 3, 3, 9, 9), size=(30, 40))
    one = opened(photos, folder, max_bad=0.9)
    assert one.categories == ("ant", "zebu") and len(one) == 2
    assert faults(one) == {
        "boxes that are no four numbers": 1,
        "boxes without area": 1,
        "boxes cut at the edge of the image": 1,
        "images of another size than stated": 1,
        "categories without an object": 1,
    }
    one = opened(photos, folder, max_bad=0.9, categories=("bee", "ant"))
    assert one.categories == ("bee", "ant") and one.pictures[0].objects.labels.tolist() == [1]
    assert "object 1 of a.xml (zebu)" in "".join(one.told())
    (folder / "a.xml").write_text("<annotation>")
    with pytest.raises(UserError, match=r"a\.xml"):
        opened(photos, folder)


def test_voc_lists_choose_images(photos, tmp_path):
    for name in "abc":
        voc(tmp_path / "Annotations", name, ("cat", 0, 3, 3, 9, 9))
    lists = tmp_path / "ImageSets/Main"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("c\na\n")
    (lists / "cat_val.txt").write_text("a  1\nb -1\nc  0\n")
    (lists / "other.txt").write_text("a\nz\n")
    assert [p.name for p in opened(photos, lists / "val.txt").pictures] == ["c.png", "a.png"]
    assert [p.name for p in opened(photos, lists / "cat_val.txt").pictures] == ["a.png", "c.png"]
    with pytest.raises(UserError, match=r"no z\.xml \(1 of 2"):
        opened(photos, lists / "other.txt")


# YOLO


def test_yolo_shares_of_the_image(photos, tmp_path):
    folder = tmp_path / "labels"
    folder.mkdir()
    (folder / "classes.txt").write_text("car\ncup\n")
    (folder / "a.txt").write_text("1 0.5 0.5 0.25 0.2\n")
    (folder / "b.txt").write_text("")
    one = opened(photos, folder)
    assert one.categories == ("car", "cup") and len(one) == 3
    assert np.allclose(one.pictures[0].objects.boxes, [[15, 12, 25, 18]])
    assert one.pictures[0].objects.labels.tolist() == [1]
    assert [len(p.objects) for p in one.pictures] == [1, 0, 0]  # c has no file


def test_yolo_polygons_tables_and_faults(photos, tmp_path):
    folder = tmp_path / "labels"
    folder.mkdir()
    table = tmp_path / "data.yaml"
    table.write_text("train: images\nnames:\n  0: car\n  5: cup\n")
    (folder / "a.txt").write_text("5 0.25 0.2 0.5 0.2 0.5 0.6 0.25 0.6\n0 .1 .1 .2 .2\n")
    one = opened(photos, table, masks=False)
    assert one.category_ids == (0, 5) and one.pictures[0].objects.labels.tolist() == [1, 0]
    assert np.allclose(one.pictures[0].objects.boxes[0], [10, 6, 20, 18])
    (folder / "a.txt").write_text("5 0.25 0.2 0.5 0.2 0.5 0.6 0.25 0.6\n")
    one = opened(photos, folder)
    expected = np.zeros((1, 30, 40), bool)
    expected[0, 6:18, 10:20] = True
    assert (one.bitmaps(0) == expected).all()
    (folder / "b.txt").write_text(
        "0 .5 .5\n3 .5 .5 .1 .1\nx .5 .5 .1 .1\n5 .5 .5 0 .1\n0 2 2 .1 .1"
    )
    (folder / "z.txt").write_text("5 0.5 0.5 0.1 0.1\n")
    one = opened(photos, folder, max_bad=0.9)
    assert {k: n for k, n in faults(one).items() if "categories" not in k} == {
        "boxes that are no four numbers": 2,
        "objects of an unknown category": 1,
        "boxes without area": 1,
        "boxes outside the image": 1,
        "images missing": 1,
    }


def test_yolo_without_names_is_one_sentence(photos, tmp_path):
    folder = tmp_path / "sub/labels/train"
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text("0 .5 .5 .1 .1\n")
    with pytest.raises(UserError, match=r"classes\.txt"):
        opened(photos, folder)
    (folder.parent / "data.yaml").write_text("names: 3")
    with pytest.raises(UserError, match="cannot read"):
        opened(photos, folder)


# CSV, real sets


def test_csv_of_boxes(photos, tmp_path):
    file = tmp_path / "boxes.csv"
    file.write_text("path,x1,y1,x2,y2,class\na.png,0,0,39,29,car\nb,5,5,5,9,cup\nb,5,5,6,9,cup\n")
    one = opened(photos, file, max_bad=0.5)
    assert one.categories == ("car", "cup") and [p.name for p in one.pictures] == ["a.png", "b.png"]
    assert one.pictures[0].objects.boxes.tolist() == [[0, 0, 40, 30]]
    assert faults(one) == {"boxes without area": 1}
    one = opened(photos, file, max_bad=0.9, categories=["cup"])
    assert faults(one)["objects of an unknown category"] == 1 and one.categories == ("cup",)


def needed(name):
    folder = DATA / name
    if not folder.is_dir():
        pytest.skip(f"no photographs in ../shared/data/{name} beside the repository")
    return folder


@pytest.mark.photos
def test_real_coco_opens():
    folder = needed("coco")
    counted = []
    for part, images, objects in (("train2017", 60, 523), ("val2017", 40, 457)):
        one = opened(folder / part, folder / f"annotations/instances_{part}.json")
        assert (len(one), sum(len(p.objects) for p in one.pictures)) == (images, objects)
        assert one.category_ids[-1] == 90 and len(one.categories) == 80
        assert set(faults(one)) == {"categories without an object"}
        counted.append(sum(p.objects.crowd.sum() for p in one.pictures))
        i, picture = next((i, p) for i, p in enumerate(one.pictures) if p.objects.crowd.any())
        for bitmap, box in zip(one.bitmaps(i), picture.objects.boxes, strict=True):
            rows, columns = np.flatnonzero(bitmap.any(axis=1)), np.flatnonzero(bitmap.any(axis=0))
            around = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            assert np.abs(around - box).max() < 3  # boxes are of outlines, with cuts between
    assert counted == [11, 7]


@pytest.mark.photos
def test_real_voc_opens():
    folder = needed("raccoon")
    one = opened(folder / "images", folder / "annotations")
    assert (len(one), sum(len(p.objects) for p in one.pictures)) == (200, 217)
    assert one.categories == ("raccoon",) and one.told() == []
