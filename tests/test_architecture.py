"""The shape of the house: what imports what, what is public, how much a reader has to open."""

import ast
import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest

import firstsight
from firstsight import methods, settings
from firstsight.views import PRESETS, Views

PACKAGE = Path(firstsight.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def test_public_names_are_sorted_and_found():
    assert firstsight.__all__ == ["load_backbone", "open_source", "pretrain"]
    for name in firstsight.__all__:
        assert callable(getattr(firstsight, name))


def test_distributed_calls_live_in_two_files():
    for path in FILES:
        text = path.read_text().replace('"torch.distributed.run"', "")  # the name of torchrun
        if path.relative_to(PACKAGE).parts[0] not in ("distributed", "parallel.py"):
            assert "torch.distributed" not in text and not re.search(r"\bdist\.", text), path
        assert ".cuda(" not in text, path


def test_benchmarks_import_what_there_is():
    """They are run by hand, and seldom: a move of modules would leave them behind."""
    for path in sorted((PACKAGE.parent / "benchmarks").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("firstsight"):
                module = importlib.import_module(node.module)
                for name in node.names:
                    inner = f"{node.module}.{name.name}"
                    assert hasattr(module, name.name) or importlib.util.find_spec(inner), path


def test_from_the_command_to_the_loss_of_moco_v2_is_a_short_read():
    """The method, the loop, and the plumbing that both name, as one device runs them."""
    read = ["methods/mocov2.py", "methods/base.py", "engine/__init__.py", "engine/update.py"]
    read += ["nets/__init__.py", "optim/__init__.py", "order.py"]
    lines = {name: len((PACKAGE / name).read_text().splitlines()) for name in read}
    assert sum(lines.values()) <= 660, lines
    assert lines["methods/mocov2.py"] <= 150


@pytest.mark.parametrize("name", methods.names())
def test_a_method_is_one_short_file(name):
    assert len((PACKAGE / "methods" / f"{name}.py").read_text().splitlines()) <= 200


@pytest.mark.parametrize("name", methods.names())
def test_method_files_do_not_import_each_other(name):
    others = "|".join(other for other in methods.names() if other != name)
    text = (PACKAGE / "methods" / f"{name}.py").read_text()
    assert not re.search(rf"import .*\b({others})\b|firstsight\.methods\.({others})\b", text)


def configs():
    yield settings.Pretrain
    yield settings.Defaults
    yield Views
    for name in methods.names():
        yield methods.load(name)[1]


def test_settings_are_frozen_and_every_flag_has_help():
    for config in configs():
        assert config.__dataclass_params__.frozen
        assert all(field.kw_only for field in dataclasses.fields(config)), config
    undocumented = []
    for path in [PACKAGE / "settings.py", *PACKAGE.glob("cli/*.py"), PACKAGE / "views/__init__.py",
                 PACKAGE / "localize/commands.py", PACKAGE / "detect/settings.py",
                 *(PACKAGE / "methods").glob("[!_]*.py")]:  # fmt: skip
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.ClassDef) or node.name in ("Defaults", "Output", "Method"):
                continue
            for field, after in zip(node.body, [*node.body[1:], None], strict=True):
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                if isinstance(field, ast.AnnAssign) and not documented:
                    undocumented.append(f"{path.name} {node.name}.{ast.unparse(field.target)}")
    assert not undocumented


def test_presets_are_views_and_defaults_name_presets():
    for name in methods.names():
        assert methods.describe(name)[1].views in PRESETS
    assert all(dataclasses.is_dataclass(preset) for preset in PRESETS.values())


def test_small_images_take_presets_without_blur():
    assert settings.preset_views("mocov2", 32).blur == (0.0,)
    assert settings.preset_views("mocov2", 64) == PRESETS["mocov2"]


def test_sizes_of_a_preset_follow_the_first():
    for size, local in ((224, 96), (32, 16), (64, 32), (112, 48), (160, 64)):
        assert settings.preset_views("swav", size).sizes == (size, local)
    _, defaults, own = methods.describe("dino")
    begun = settings.begun(defaults, own, {"size": 64, "views": {"sizes": [64, 24]}}, "test")
    assert begun.views.sizes == (64, 24)


def test_short_runs_shorten_the_warm_up_with_them():
    _, defaults, own = methods.describe("simclr")

    def warmup(**values):
        return settings.begun(defaults, own, values, "test").warmup_epochs

    assert warmup() == 10 and warmup(epochs=10) == 1 and warmup(epochs=1000) == 10
    assert warmup(epochs=10, warmup_epochs=3) == 3
