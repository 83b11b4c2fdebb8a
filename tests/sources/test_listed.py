"""Lists: what a line says, which lines are refused, and where."""

import pickle
import sys

import pytest

from firstsight.errors import UserError
from firstsight.sources import UnreadableImage, open_source
from firstsight.sources.listed import Listed
from tests.sources.pictures import png


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(["a.png", "b c.png", "x@y/d.PNG", "e 7.png"]):
        file = tmp_path / "images" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(number))
    return tmp_path


def write(folder, name, text):
    file = folder / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def greys(source):
    return [int(source.pixels(index)[0, 0, 0]) for index in range(len(source))]


@pytest.mark.parametrize(
    ("text", "expected", "classes", "labels"),
    [
        ("images/b c.png\r\n\r\nimages/a.png", [1, 0], (), None),
        ("images/b c.png\t10\nimages/a.png\t9\n", [1, 0], ("9", "10"), [1, 0]),
        ("images/x@y/d.PNG\t1\nimages/a.png\t1\n", [2, 0], ("1",), [0, 0]),
        ("images/b c.png 10\nimages/e 7.png -3\n", [1, 3], ("-3", "10"), [1, 0]),
        ("\ufeffimages/a.png\ta cat\nimages/e 7.png\tant\n", [0, 3], ("a cat", "ant"), [0, 1]),
        ("images/e 7.png\n", [3], (), None),  # a space in a name is no label
    ],
)  # fmt: skip
def test_text(folder, text, expected, classes, labels):
    source = open_source(str(write(folder, "list.txt", text)))
    assert isinstance(source, Listed) and greys(source) == expected
    assert source.classes == classes
    assert (None if source.labels is None else source.labels.tolist()) == labels


@pytest.mark.parametrize(
    "text",
    [
        "path,label\nimages/b c.png,dog\nimages/a.png,cat\n",
        "Label, ID ,Image\r\ndog,1,images/b c.png\r\ncat,2,images/a.png\r\n",
        'images/b c.png,dog\n"images/a.png",cat\n',
    ],
)
def test_csv(folder, text):
    source = open_source(str(write(folder, "list.csv", text)))
    assert [source.identity(i) for i in range(2)] == ["images/b c.png", "images/a.png"]
    assert source.classes == ("cat", "dog") and source.labels.tolist() == [1, 0]
    assert greys(source) == [1, 0]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("l.txt", "images/a.png\nimages/a.txt\n", "line 2: .*does not end like an image"),
        ("l.txt", "images/a.png 1\n\nimages/a.png 2\n", "line 3: .*twice, first in line 1"),
        ("l.txt", "images/a.png 1\nimages/e 7.png\n", "line 2: .*has no label, unlike"),
        ("l.txt", "images/a.png\nimages/e 7.png\tx\n", "line 2: .*has a label, unlike"),
        ("l.txt", "\n \n", "names no image"),
        ("l.txt", "nowhere/a.png\n", "there is no .*nowhere/a.png.*relative to the folder"),
        ("l.csv", "url,label\nimages/a.png,1\n", "columns url, label.*must be called path"),
        ("l.csv", "label,path\n1,images/a.png\n2\n", "line 3: '' does not end like an image"),
    ],
)
def test_a_wrong_line_is_named(folder, name, text, said):
    with pytest.raises(UserError, match=said):
        open_source(str(write(folder, name, text)))


def test_names_in_any_encoding(folder):
    with open(bytes(folder / "images") + b"/\xff.png", "wb") as file:
        file.write(png(99))
    source = open_source(str(write(folder, "list.txt", b"images/\xff.png\nimages/a.png\n")))
    assert greys(source) == [99, 0] and source.identity(0) == "images/\udcff.png"
    assert pickle.loads(pickle.dumps(source)).fingerprint() == source.fingerprint()


def test_a_file_that_vanished_and_a_path_that_cannot_be_are_unreadable(folder):
    source = open_source(str(write(folder, "l.txt", "images/a.png\nimages/no.png\nim\0.png\n")))
    for index in (1, 2):
        with pytest.raises(UnreadableImage):
            source.pixels(index)


def test_parquet_without_its_package_names_the_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"firstsight\[parquet\]"):
        open_source(str(write(folder, "list.parquet", b"PAR1")))


@pytest.fixture
def table(folder):
    """Columns to a Parquet file, by pyarrow itself."""
    pyarrow = pytest.importorskip("pyarrow", reason="pip install 'firstsight[parquet]'")
    parquet = pytest.importorskip("pyarrow.parquet")

    def written(**columns):
        parquet.write_table(pyarrow.table(columns), folder / "list.parquet")
        return str(folder / "list.parquet")

    return written


def test_parquet(table, folder):
    paths = ["images/b c.png", "images/a.png"]
    source = open_source(table(n=[1, 2], file_name=paths, label=[7, 3]))
    assert greys(source) == [1, 0]
    assert source.classes == ("3", "7") and source.labels.tolist() == [1, 0]
    assert open_source(table(Path=paths, n=[1, 2])).labels is None
    (folder / "list.parquet").write_bytes(b"hello")
    with pytest.raises(UserError, match="not a whole Parquet file"):
        open_source(str(folder / "list.parquet"))


def test_kinds_of_columns_of_parquet(table):
    import pyarrow

    paths = pyarrow.array(["images/b c.png", "images/a.png"], pyarrow.large_string())
    names = pyarrow.array(["dog", "cat"]).dictionary_encode()
    source = open_source(table(image=paths, target=names))
    assert greys(source) == [1, 0] and source.classes == ("cat", "dog")
    assert source.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"path": ["images/a.png", None]}, r"list\.parquet, row 2: '' does not end like"),
        ({"path": ["images/a.png"] * 2}, "row 2: .*twice, first in row 1"),
        ({"path": ["images/a.png", "images/e 7.png"], "label": [1, None]}, "row 2: .*has no label"),
        ({"url": ["images/a.png"]}, "has the columns url; that of the paths must be called"),
        ({"path": []}, "names no image"),
        ({"image": [{"bytes": b"x", "path": "a.png"}]}, r"holds images, .*; use hf:/.*:train"),
        ({"image": [b"x"]}, "holds images, not their paths"),
    ],
)
def test_a_wrong_row_of_parquet_is_named(table, columns, said):
    with pytest.raises(UserError, match=said):
        open_source(table(**columns))
