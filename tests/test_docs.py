"""What the pages say is what the commands do.

Pages are README.md and docs/*.md. A command is a line of a fenced `sh` or `console` block that
begins with `firstsight` (in `console` after `$ `; other lines there are output) or with `torchrun`
or `srun`.

- The everyday part parses every command of every page: unknown flags, values of the wrong kind and
  unknown methods fail.
- The slow part runs them, page by page in one folder, in the order of the page, then its Python. It
  makes the photographs and foreign checkpoints that a command names, and makes runs small: sources
  of generated scenes have SCENES images, and SMALLER goes behind the flags of the page, where the
  last one wins. Epochs stay as the page has them up to MOST_EPOCHS.
- Never run, only parsed: what needs several processes, a GPU, a compiler, or weights to download.
"""

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torchvision

from firstsight import cli, settings

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCENES = 40
MOST_EPOCHS = 3
SMALLER = {
    "pretrain": "--backbone timm:test_resnet --size 32 --batch-size 8 --workers 0 --threads 1 "
    "--precision fp32 --layout contiguous --device cpu --probe-readings 1 --warmup-epochs 0",
    "demo": "--epochs 0.4 --threads 1 --device cpu",
    "evaluate": "--threads 1 --device cpu",
    "localize": "--images 6 --threads 1 --device cpu",
    "masks": "--threads 1 --device cpu",
    "diagnose": "--threads 1 --device cpu",
    "embed": "--threads 1 --device cpu",
    "detect": "--threads 1 --device cpu",
    "detect train": "--steps 2 --short-sides 48 --scales choice --channels 16 --rois 8",
    "bench": "--backbone timm:test_resnet --size 32 --images 4 --machines 2 --threads 1 "
    "--precision fp32 --layout contiguous --device cpu",
}
PLACEHOLDERS = {"RUN": "runs/simclr-001", "SEED": "0"}
NEEDS_MORE = re.compile(
    r"^torchrun|^srun|^firstsight launch|supervised\.th|--device (cuda|mps)|--compile|torchvision:"
    r"|--to onnx"
)
ADDED = "hypersphere"  # the method that a page adds: its commands are those of other tests below


def blocks(page, *languages):
    """Fenced blocks of a page in these languages."""
    pattern = rf"^```(?:{'|'.join(languages)})\n(.*?)^```"
    return re.findall(pattern, page.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands(page):
    """Commands of a page as lists of words, `firstsight` itself left out; torchrun's as a line."""
    found = []
    for text in blocks(page, "sh", "console"):
        for line in text.replace("\\\n", " ").splitlines():
            line = line.removeprefix("$ ")
            if line.startswith(("firstsight ", "torchrun ", "srun ")):
                found.append(shlex.split(line, comments=True))
    return found


ALL = [(page, words) for page in PAGES for words in commands(page) if ADDED not in words]


class Reached(Exception):
    """A command understood all its words."""


def arguments(words):
    """What follows `firstsight` in a command, placeholders filled in."""
    after = words[words.index("firstsight") + 1 :]
    return [PLACEHOLDERS.get(word, word) for word in after]


@pytest.mark.parametrize(
    ("page", "words"), ALL, ids=[f"{page.stem}-{' '.join(words)[:60]}" for page, words in ALL]
)
def test_every_command_of_the_docs_is_understood(page, words, monkeypatch, capsys):
    from firstsight import convert, data, detect, diagnose, embed, evaluate, localize, report, run
    from firstsight import scale as bench

    def reached(*_, **__):
        raise Reached

    for module, names in {
        run: ("pretrain", "dry_run", "demo"),
        evaluate: ("dense", "finetune", "instance", "knn", "linear", "over_snapshots"),
        diagnose: ("run",),
        embed: ("run",),
        localize: ("run", "masks"),
        detect: ("train", "evaluate", "compare"),
        report: ("write_report",),
        data: ("info", "pack", "subset", "verify", "views", "zip_up"),
        convert: ("read",),
        bench: ("scale",),
    }.items():
        for name in names:
            monkeypatch.setattr(module, name, reached)
    monkeypatch.setattr(os, "execv", lambda _, words: cli.main(arguments(words)))  # of launch
    monkeypatch.setattr(settings, "read_yaml", lambda path: {"data": "as in the file"})
    args = arguments(words)
    try:
        cli.main(args)
    except Reached:
        return
    except SystemExit as error:
        assert error.code == 0, capsys.readouterr()
    shown = ("--help" in args, args == ["pretrain"], args[0] == "recipes")
    assert any(shown), "said something and did nothing"


PHOTOGRAPHS = 12


def photographs(path, labelled):
    """Twelve pictures in a folder, flat or of two classes, or in a `.zip` of such a folder."""
    if path.suffix == ".zip":
        photographs(path.with_suffix(""), labelled)
        shutil.make_archive(str(path.with_suffix("")), "zip", path.with_suffix(""))
        return
    generator = np.random.default_rng(0)
    for i in range(PHOTOGRAPHS):
        folder = path / ("cats" if i % 2 else "dogs") if labelled else path
        folder.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / f"{i}.jpg"), generator.integers(0, 256, (40, 48, 3)))


def annotations(path):
    """Where the objects of such photographs are: CUB's text, Pascal VOC's XML, or index masks."""
    if path.suffix == ".txt":
        names = [f"{i} {'cats' if i % 2 else 'dogs'}/{i}.jpg\n" for i in range(PHOTOGRAPHS)]
        path.with_name("images.txt").write_text("".join(names))
        path.write_text("".join(f"{i} 5 5 30 20\n" for i in range(PHOTOGRAPHS)))
        return
    path.mkdir(parents=True)
    if "masks" in path.name:
        (path / "classes.txt").write_text("ground\npet\n")
        for i in range(PHOTOGRAPHS):
            cv2.imwrite(str(path / f"{i}.png"), np.eye(40, 48, dtype=np.uint8))
        return
    corners = "<xmin>6</xmin><ymin>6</ymin><xmax>35</xmax><ymax>25</ymax>"
    for i in range(PHOTOGRAPHS):
        thing = f"<object><name>pet</name><bndbox>{corners}</bndbox></object>"
        (path / f"{i}.xml").write_text(f"<annotation>{thing}</annotation>")


def foreign(path):
    """A file of MoCo, SwAV or SEED, as its name says."""
    weights = torchvision.models.resnet18().state_dict()
    halves = {"swav": ("",), "seed": ("student.", "teacher.")}.get(path.name[:4], ("encoder_q.",))
    state = {f"module.{half}{key}": weights[key] for half in halves for key in weights}
    torch.save({"state_dict": state | {"module.prototypes.weight": torch.ones(1)}}, path)


def small(args):
    """The arguments of a command, made small by the rule above."""
    if args == ["pretrain"]:  # lists the methods
        return args
    args = [re.sub(r"^(scenes:\w+)(@\d+)?$", rf"\1@{SCENES}", word) for word in args]
    if "--k" in args:  # no more neighbours than there are images
        at = args.index("--k") + 1
        for place in itertools.takewhile(lambda i: args[i].isdigit(), range(at, len(args))):
            args[place] = str(min(int(args[place]), SCENES, PHOTOGRAPHS))
    if args[:2] == ["pretrain", "scrl"]:
        args += ["--method.min-size", "8"]  # two boxes must fit into a view
    if args[0] == "pretrain" and "--epochs" in args:
        at = args.index("--epochs") + 1
        args[at] = str(min(float(args[at]), MOST_EPOCHS))
    elif args[0] == "pretrain":
        args += ["--epochs", "1"]
    if args[0] == "detect" and args[1] in ("train", "compare"):
        args += shlex.split(SMALLER["detect train"])
    if args[:2] == ["evaluate", "dense"]:
        # a tiny network's last map has one cell, its first thousands
        args += ["--stage", "0", "--cells", "300", "--epochs", "2"]
    return args + shlex.split(SMALLER.get(args[0], ""))


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_the_commands_of_a_page_run_in_its_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in commands(page):
        if NEEDS_MORE.search(" ".join(words)) or ADDED in words:
            continue
        args = small(arguments(words))
        if args[0] == "convert" and not Path(args[1]).exists():
            foreign(Path(args[1]))
        for flag, value in itertools.pairwise(args):
            path = Path(value)
            is_source = re.fullmatch(r"--((test-)?data|(probe-)?(train|test))|info", flag)
            if is_source and ":" not in value and not path.exists():
                photographs(path, labelled="photos" not in value or flag == "info")
            if flag in ("--boxes", "--annotations", "--test-annotations") and not path.exists():
                annotations(path)
        try:
            cli.main(args)
        except SystemExit as error:
            assert error.code == 0, args
    names = {"images": torch.zeros(2, 3, 32, 32)}
    for text in blocks(page, "python") if page.stem != "new_method" else []:
        exec(compile(text, page.name, "exec"), names)


HOLDS_FLAG = re.compile(r"(?<![\w-])--[a-z][\w.-]*")


def tables(page):
    """The tables of a page: cells of the header, then cells of each row."""
    found, rows = [], []
    for line in [*page.read_text().splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            found.append((rows[0], rows[2:]))
            rows = []
    return found


def helped(command, capsys):
    """Flags in the help of a command; None where there is no such command."""
    try:
        cli.main([*command.split()[1:], "--help"])
    except SystemExit as error:
        if error.code:
            return None
    return set(HOLDS_FLAG.findall(capsys.readouterr().out))


def test_flags_of_coming_from_exist_and_what_is_not_yet_there_does_not(capsys, monkeypatch):
    """In each row the second cell says flags of the command above it, or whole commands."""
    monkeypatch.setenv("COLUMNS", "200")
    checked = 0
    for header, rows in tables(ROOT / "docs/coming_from.md"):
        of = header[1].strip("`")
        known = helped(of, capsys) if of.startswith("firstsight") else set()
        for row in rows:
            spans = re.findall(r"`([^`]+)`", row[1])
            commands = [span for span in spans if span.startswith("firstsight")]
            flags = [flag for span in spans for flag in HOLDS_FLAG.findall(span)]
            here = [helped(command, capsys) is not None for command in commands]
            here += [flag in known for flag in flags]
            checked += len(here)
            if "not yet" in row[1]:
                assert not any(here), f"no longer missing, say how it is done now: {row}"
            else:
                assert all(here), f"there is no such thing in {header[1]}: {row}"
    assert checked > 100


def test_every_fault_of_reliability_names_tests_that_there_are():
    """In the last cell of each row: `file.py`: `part of a name`, ...; `file.py`: ..."""
    tests = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    found = [rows for header, rows in tables(ROOT / "docs/reliability.md") if header[-1] == "test"]
    cells = [row[-1] for rows in found for row in rows]
    assert len(cells) > 20 and all(re.match(r"`test_\w+\.py`: `", cell) for cell in cells), cells
    for cell in cells:
        for file, names in re.findall(r"`(test_\w+\.py)`: ((?:`\w+`(?:, )?)+)", cell):
            for name in re.findall(r"`(\w+)`", names):
                assert re.search(rf"^def test_\w*{name}", tests[file], re.M), f"{file}: {name}"


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.fixture(scope="module")
def with_hypersphere(tmp_path_factory):
    """A copy of the package and its tests with the files of docs/new_method.md put in."""
    tree = tmp_path_factory.mktemp("tree")
    skipped = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "firstsight", tree / "firstsight", ignore=skipped)
    shutil.copytree(ROOT / "tests", tree / "tests", ignore=skipped)
    shutil.copy(ROOT / "pyproject.toml", tree)
    method, formula = blocks(ROOT / "docs/new_method.md", "python")
    (tree / "firstsight/methods/hypersphere.py").write_text(method)
    (tree / "tests/methods/test_hypersphere.py").write_text(formula)
    return tree


def python(tree, *args):
    """Run `python ARGS` in the copied tree, whose package is found before any other."""
    done = subprocess.run(
        [sys.executable, *args], cwd=tree, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_method_is_one_file(with_hypersphere):
    """Command, flags and help appear from it, and it trains; the file is a short one."""
    file = with_hypersphere / "firstsight/methods/hypersphere.py"
    assert sum(map(bool, file.read_text().splitlines())) <= 65
    one, other = (w for w in commands(ROOT / "docs/new_method.md") if "hypersphere" in w)
    listed = python(with_hypersphere, "-m", "firstsight", "pretrain")
    assert re.search("^  hypersphere +Hypersphere: embeddings", listed, re.MULTILINE)
    shown = " ".join(python(with_hypersphere, "-m", *one).replace("│", "").split())
    assert "--method.uniformity" in shown and "nothing that keeps images apart" in shown
    python(with_hypersphere, "-m", "firstsight", *small(arguments(other)), "--out", "run")
    records = [json.loads(line) for line in (with_hypersphere / "run/log.jsonl").open()]
    assert (
        records[-1]["step"] == 10
        and "uniformity: 0.5" in (with_hypersphere / "run/config.yaml").read_text()
    )


@pytest.mark.slow
def test_a_new_method_takes_part_in_the_tests_of_all(with_hypersphere):
    """Gradients, ranks, chunks, resume, and the page's own test of its formula."""
    only = ("-m", "pytest", "-p", "no:cacheprovider", "-k", "hypersphere")
    said = python(with_hypersphere, *only, "tests/methods", "tests/test_architecture.py")
    assert int(re.search(r"(\d+) passed", said)[1]) >= 10 and "failed" not in said


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    """Its code cells in one namespace, with few images and epochs."""
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "docs/first_look.ipynb").read_text())
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    assert "IMAGES = " in cells[0] and "EPOCHS = " in cells[0]
    cells[0] = re.sub(r"IMAGES = \d+", "IMAGES = 64", cells[0])
    cells[0] = re.sub(r"EPOCHS = \d+", "EPOCHS = 1", cells[0])
    names = {}
    for cell in cells:
        exec(compile(cell, "first_look.ipynb", "exec"), names)


def test_the_notebook_keeps_no_large_outputs():
    assert (ROOT / "docs/first_look.ipynb").stat().st_size < 20_000
