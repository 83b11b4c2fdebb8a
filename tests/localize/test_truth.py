"""One reader for each kind of file; which box belongs to which image; what is left out."""

import json

import numpy as np
import pytest

from firstsight.errors import UserError
from firstsight.localize.boxes import read_boxes, scaled, scaled_as_published
from firstsight.localize.truth import Truth, match, placed, truth_of
from firstsight.sources.base import Source

XML = "<annotation><filename>other.jpg</filename>{}</annotation>"
OBJECT = (
    "<object><name>{}</name><truncated>0</truncated><bndbox><xmin>{}</xmin><ymin>{}</ymin>"
    "<xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)


class Named(Source):
    """Images that have only names."""

    def __init__(self, names, classes=(), labels=None, spec="photos"):
        self.names, self.classes, self.spec = names, classes, spec
        self.labels = None if labels is None else np.array(labels)

    def __len__(self):
        return len(self.names)

    def identity(self, index):
        return self.names[index]

    def pixels(self, index):
        raise NotImplementedError


def held(path):
    manifest = read_boxes(str(path))
    return manifest, {key: list(zip(m.boxes, m.names, strict=True))
                      for key, m in manifest.images.items()}  # fmt: skip


def test_csv_counts_pixels_from_0_and_includes_the_last(tmp_path):
    file = tmp_path / "boxes.csv"
    file.write_text("path,x1,y1,x2,y2\na/1.png,16,10,35,26\na/1.png,0,0,1,1\na/2.png,5,5,5,9\n")
    manifest, boxes = held(file)
    assert boxes == {"a/1.png": [((16, 10, 36, 27), ""), ((0, 0, 2, 2), "")], "a/2.png": []}
    assert manifest.degenerate == 1  # no width


def test_csv_from_voc_counts_from_1_and_names_classes(tmp_path):
    file = tmp_path / "labels.csv"
    file.write_text(
        "filename,width,height,class,xmin,ymin,xmax,ymax\nr.jpg,650,417,raccoon,81,88,522,408\n"
    )
    assert held(file)[1] == {"r.jpg": [((80, 87, 522, 408), "raccoon")]}


def test_csv_of_imagenet(tmp_path):
    file = tmp_path / "LOC_val_solution.csv"
    file.write_text("ImageId,PredictionString\nv_1,n01 85 1 499 272 n02 3 4 5 6 \nv_2,\n")
    manifest, boxes = held(file)
    assert boxes == {"v_1": [((84, 0, 499, 272), "n01"), ((2, 3, 5, 6), "n02")], "v_2": []}
    assert manifest.kind == "xml"


def test_coco_writes_x_y_width_height_and_its_crowds_are_left_out(tmp_path):
    file = tmp_path / "instances.json"
    rows = [
        {"image_id": 7, "bbox": [282.8, 77.33, 138.69, 110.52], "category_id": 3, "iscrowd": 0},
        {"image_id": 7, "bbox": [1, 1, 0, 5], "category_id": 3, "iscrowd": 0},
        {"image_id": 7, "bbox": [1, 1, 9, 5], "category_id": 3, "iscrowd": 1},
    ]
    files = [{"id": 7, "file_name": "7.jpg"}, {"id": 8, "file_name": "8.jpg"}]
    data = {"images": files, "annotations": rows, "categories": [{"id": 3, "name": "car"}]}
    file.write_text(json.dumps(data))
    manifest, boxes = held(file)
    ((box, name),) = boxes["7.jpg"]
    assert np.allclose(box, (282.8, 77.33, 421.49, 187.85)) and name == "car"
    assert boxes["8.jpg"] == [] and (manifest.degenerate, manifest.crowds) == (1, 1)


def test_xml_counts_from_1_and_is_named_by_its_own_path(tmp_path):
    (tmp_path / "n01").mkdir()
    text = XML.format(OBJECT.format("n01", 101, 51, 401, 301) + OBJECT.format("n09", 2, 2, 9, 9))
    (tmp_path / "n01/v.1.xml").write_text(text)
    (tmp_path / "n01/v.2.xml").write_text(XML.format(""))
    _, boxes = held(tmp_path)
    assert boxes == {
        "n01/v.1": [((100, 50, 401, 301), "n01"), ((1, 1, 9, 9), "n09")],
        "n01/v.2": [],
    }
    (tmp_path / "n01/v.3.xml").write_text("<annotation><object></annotation>")
    with pytest.raises(UserError, match=r"v\.3\.xml"):
        read_boxes(str(tmp_path))


def test_cub_is_two_text_files(tmp_path):
    (tmp_path / "images.txt").write_text("1 001.Albatross/A 1.jpg\n2 002.X/B.jpg\n")
    (tmp_path / "bounding_boxes.txt").write_text("1 60.0 27.0 325.0 304.0\n2 1.0 2.0 3.0 4.0\n")
    expected = {"001.Albatross/A 1.jpg": [((60, 27, 385, 331), "")],
                "002.X/B.jpg": [((1, 2, 4, 6), "")]}  # fmt: skip
    assert held(tmp_path)[1] == held(tmp_path / "bounding_boxes.txt")[1] == expected


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "x,y\n1,2\n"),
        ("a.csv", "path,x1,y1,x2,y2\na.png,one,2,3,4\n"),
        ("a.csv", ""),
        ("a.json", "[1, 2"),
        ("a.json", '{"images": []}'),
        ("a.json", '{"images": [], "annotations": []}'),
        ("folder", None),
    ],
)
def test_what_holds_no_boxes_is_one_sentence(name, text, tmp_path):
    path = tmp_path / name
    path.mkdir() if text is None else path.write_text(text)
    with pytest.raises(UserError, match="it should be a CSV"):
        read_boxes(str(path))
    with pytest.raises(UserError, match="there is no nowhere; --boxes takes a CSV"):
        read_boxes("nowhere")


def test_published_vectors_of_scaling():
    cub = np.array([[60.0, 27, 385, 331]])
    assert scaled_as_published(cub, 500, 335, 224, "cub").tolist() == [[26, 18, 171, 221]]
    imagenet = np.array([[100.0, 50, 401, 301]])  # as read from 101, 51, 401, 301
    published = scaled_as_published(imagenet, 500, 375, 224, "xml")
    assert np.allclose(published, [[44.8, 29.8667, 179.2, 179.2]], atol=5e-5)
    ours = scaled(imagenet, 500, 375, 224)
    assert np.allclose(ours, [[44.8, 29.86667, 179.648, 179.79733]])


def test_images_find_their_boxes_by_the_end_of_their_path():
    keys = ["train/n1/a.JPEG", "val/n1/a.JPEG", "train/n2/b.JPEG"]
    assert match(["train/n1/a.JPEG"], keys, "tiny") == {0: keys[0]}
    assert match(["n1/a.JPEG", "n2/zz.JPEG"], keys, "tiny/val") == {0: keys[1]}
    assert match(["JPEGImages/000012.jpg"], ["Annotations/000012"], "VOC") == {0: keys_of("000012")}
    with pytest.raises(UserError, match=r"may be train/n1/a\.JPEG or val/n1/a\.JPEG"):
        match(["n1/a.JPEG"], keys, "elsewhere")


def keys_of(name):
    return f"Annotations/{name}"


def test_annotations_of_other_images_are_refused_and_counted(tmp_path):
    file = tmp_path / "boxes.csv"
    file.write_text("path,x1,y1,x2,y2\na.png,1,1,5,5\nz.png,1,1,5,5\n")
    truth = truth_of(Named(["a.png", "b.png"]), str(file))
    assert list(truth.marked) == [0] and truth.counts["annotated_elsewhere"] == 1
    with pytest.raises(UserError, match=r"marks no image of photos: it begins with a\.png"):
        truth_of(Named(["c.png"]), str(file))
    assert truth_of(Named(["c.png"]), "") is None


def test_only_boxes_of_the_class_of_an_image_count_where_the_file_names_it(tmp_path):
    (tmp_path / "n1").mkdir()
    text = XML.format(OBJECT.format("n1", 1, 1, 5, 5) + OBJECT.format("n2", 1, 1, 9, 9))
    (tmp_path / "n1/a.xml").write_text(text)
    source = Named(["n1/a.jpg", "n2/b.jpg"], ("n1", "n2"), [0, 1])
    assert truth_of(source, str(tmp_path)).marked[0].boxes == [(0, 0, 5, 5)]
    both = Named(["n1/a.jpg"])
    assert len(truth_of(both, str(tmp_path)).marked[0].boxes) == 2


def test_boxes_are_cut_at_the_edges_of_their_image_and_those_outside_are_degenerate(tmp_path):
    file = tmp_path / "boxes.csv"
    file.write_text("path,x1,y1,x2,y2\na.png,-5,2,9,7\na.png,30,2,40,9\na.png,1,1,3,3\n")
    truth = truth_of(Named(["a.png"]), str(file))
    found = placed(truth.marked[0], 20, 10, 200, truth.kind)
    assert found.boxes.tolist() == [[0, 40, 100, 160], [10, 20, 40, 80]]
    assert (found.outside, found.degenerate) == (2, 1)
    assert isinstance(truth, Truth)
