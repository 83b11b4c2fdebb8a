"""What people type: help at once, one sentence for what they can mend, exit code 2."""

import dataclasses
import importlib
import inspect
import json
import re
import subprocess
import sys

import pytest
import yaml
from PIL import Image

from firstsight import cli, settings
from firstsight.cli import flags, health, judge, shown
from firstsight.errors import UserError


def failing(capsys, *args):
    with pytest.raises(SystemExit) as caught:
        cli.main(list(args))
    assert caught.value.code == 2
    return capsys.readouterr().err


LIGHT = ["", "pretrain", "pretrain mocov2 --help", "evaluate", "evaluate knn -h", "recipes"]
LIGHT += ["recipes -h", "recipes byol-1000ep", "data", "data sort-imagenet-val -h"]
LIGHT += [f"data {work} -h" for work in ("zip", "verify", "subset", "views", "info")]
LIGHT += ["report -h", "demo -h", "evaluate linear -h", "localize -h", "masks -h", "convert -h"]
LIGHT += ["report -h", "demo -h", "evaluate linear -h", "evaluate instance -h"]
LIGHT += ["detect", "detect train -h", "detect eval -h", "detect compare -h"]
LIGHT += ["evaluate finetune -h", "diagnose -h", "embed -h"]


def test_help_and_flags_come_without_torch():
    script = (
        "import sys\nfrom firstsight import cli\n"
        f"for line in {LIGHT}:\n"
        "    try:\n        cli.main(line.split())\n    except SystemExit as error:\n"
        "        assert not error.code\n"
        "assert 'torch' not in sys.modules, 'torch'\nassert 'cv2' not in sys.modules, 'cv2'\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--method.queue-size" in done.stdout and "65536" in done.stdout
    assert "number of past keys" in done.stdout  # the help of a field is its docstring


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["pretrian"], "no command called 'pretrian' (did you mean 'pretrain'?)"),
        (["pretrain", "mocov3x"], "no method called 'mocov3x' (did you mean 'mocov3'?)"),
        (["pretrain", "mocov2", "--data", "x", "--epohcs", "3"], "--epochs"),
        (["pretrain", "mocov2", "--data", "x", "--epochs", "many"], "many"),
        (["pretrain", "mocov2", "--data", "x", "--batch-size", "2.5"], "2.5"),
        (["pretrain", "mocov2", "--optimizer", "lions"], "lions"),
        (["pretrain", "mocov2"], "use --data SOURCE"),
        (["pretrain", "mocov2", "--data", "x", "--epochs", "-1"], "--epochs must be above 0"),
        (["pretrain", "mocov2", "--data", "x", "--config"], "--config needs a file"),
        (["pretrain", "mocov2", "--resume"], "the same command again goes on"),
        (["pretrain", "mocov2", "--data"], "Missing value for argument '--data'"),
        (["evaluate", "knn"], "still to be given: CHECKPOINT, --train, --test"),
        (["evaluate", "knn", "run", "--test", "x"], "still to be given: --train"),
        (["data", "sort-imagenet-val", "--out", "x"], "still to be given: IMAGES, --truth"),
        (["localize"], "still to be given: --data"),
        (["masks", "--data", "x"], "still to be given: --out"),
        (["detect", "trian"], "no work called 'trian' (did you mean 'train'?)"),
        (["detect", "train", "--data", "x"], "still to be given: CHECKPOINT, --out"),
        (["detect", "eval"], "still to be given: RUN"),
        (["evaluate", "knnn"], "no reading called 'knnn' (did you mean 'knn'?)"),
        (["convert", "x"], "still to be given: DST;"),
        (
            ["convert", "x", "y", "--to", "tim"],
            "--to tim is none of torchvision, timm, detectron2,",
        ),
        (["pretrain", "byol", "--probe", "all"], "--probe all is none of knn, linear, both, none;"),
        (["pretrain", "byol", "--input-size", "9"], "no option --input-size: did you mean --size?"),
        (["localize", "--size", "9"], "no option --size: did you mean --input-size?"),
        (["embed", "--img_size=9"], "no option --img_size: did you mean --size?"),
        (
            ["recipes", "byol-200ep"],
            "'byol-1000ep', 'byol-40ep'?); firstsight recipes lists all",
        ),
        (["recipes", "zzz"], "no recipe called 'zzz'; firstsight recipes lists all"),
    ],
)
def test_what_a_user_can_mend_is_said_with_exit_code_2(args, said, capsys):
    err = failing(capsys, *args)
    assert said in err and "Traceback" not in err
    assert len(err.splitlines()) == 1, err


def test_of_a_flag_given_twice_the_last_counts():
    args = ["--size", "1", "--json", "a", "--size=2", "--json=b", "x"]
    assert flags.peeked(args, "--size") == "2" and flags.peeked(args, "--sizes") is None
    assert flags.taken(args, "--json") == ("b", ["--size", "1", "--size=2", "x"])


def test_a_config_file_gives_way_to_flags_and_refuses_what_it_does_not_know(tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text("epochs: 7\nweight_decay: 1e-6\nviews: {min-scale: [0.3]}\nmethod: {dim: 64}\n")
    values = settings.read_yaml(file)
    assert values["weight_decay"] == "1e-6"  # YAML 1.1 reads it so
    from firstsight import methods

    _, defaults, own = methods.describe("mocov2")
    start = settings.begun(defaults, own, values, str(file))
    assert start.weight_decay == 1e-6 and start.epochs == 7.0
    assert start.views.min_scale == (0.3,) and start.method.dim == 64
    parsed = flags.flagged(
        settings.Pretrain, ["--epochs", "9", "--views/gray", "0.1"], "pretrain", "", start
    )
    assert parsed.epochs == 9.0 and parsed.views.gray == 0.1 and parsed.method.dim == 64
    file.write_text("method: {temprature: 1}\n")
    err = failing(capsys, "pretrain", "mocov2", "--config", str(file))
    assert "did you mean 'temperature'?" in err
    file.write_text("epochs: soon\n")
    assert "soon" in failing(capsys, "pretrain", "mocov2", "--config", str(file))
    file.write_text("size: !!python/object/apply:os.system ['true']\n")
    assert "not plain YAML" in failing(capsys, "pretrain", "mocov2", "--config", str(file))
    file.write_text("views:\n  hue: 0.1\nseed: 1\nviews:\n  gray: 0.3\n")
    assert "views comes twice" in failing(capsys, "pretrain", "mocov2", "--config", str(file))


@pytest.mark.parametrize(
    ("word", "meant"),
    [(w, True) for w in ("yes", "Yes", "true", "TRUE", "t", "Y", "1", True)]
    + [(w, False) for w in ("no", "NO", "false", "False", "F", "n", "0", False)],
)
def test_switches_are_told_in_any_spelling(word, meant):
    start = settings.Pretrain(data="x")
    assert settings.merged(start, {"compile": word}, "c.yaml").compile is meant
    for args in (
        ["--compile", str(word)],
        [f"--compile={word}"],
        ["--compile", str(word), "--seed", "1"],
    ):
        assert flags.flagged(settings.Pretrain, args, "pretrain", "", start).compile is meant


def test_a_switch_alone_is_on_and_eats_nothing():
    start = settings.Pretrain(data="x")
    for args in (["--compile"], ["--compile", "--dry-run", "no", "--epochs", "1"]):
        parsed = flags.flagged(settings.Pretrain, args, "pretrain", "", start)
        assert parsed.compile and not parsed.dry_run
    assert parsed.epochs == 1.0
    with pytest.raises(UserError, match="'maybe' is not bool"):
        settings.merged(start, {"compile": "maybe"}, "c.yaml")


def test_a_warm_up_that_would_lose_an_epoch_is_refused():
    start = settings.Pretrain(data="x", lr_every="epoch")
    with pytest.raises(
        UserError, match=r"--warmup-epochs 0\.3 with --lr-every epoch holds the rate"
    ):
        settings.merged(start, {"warmup_epochs": 0.3}, "c.yaml")
    for more in ({"lr_start": 0.1}, {"lr_every": "step"}, {"lr_at": "end"}):
        settings.merged(start, {"warmup_epochs": 0.3, **more}, "c.yaml")


def test_files_take_the_words_that_flags_take():
    start = settings.Pretrain(data="x", lr=0.5)
    told = {"lr": "unset", "weight_decay_end": "none", "resident": "yes"}
    read = settings.merged(start, told, "c.yaml")
    assert (read.lr, read.weight_decay_end, read.resident) == (None, None, True)
    assert settings.merged(start, {"resident": 1}, "c.yaml").resident is True
    assert settings.merged(start, {"resident": "auto"}, "c.yaml").resident == "auto"
    with pytest.raises(UserError, match=r"c.yaml: undecayed: 'norm' is not tuple"):
        settings.merged(start, {"undecayed": "norm"}, "c.yaml")


def test_help_speaks_of_words_and_takes_them(capsys):
    with pytest.raises(SystemExit):
        cli.main(["pretrain", "dino", "--help"])
    said = capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["convert", "--help"])
    said += capsys.readouterr().out
    assert not re.search(r"True|False|None|STR|''|\(default: *\)", said)
    assert "--compile {yes,no}" in said and "--resident {yes,no,auto}" in said
    assert "--drops FLOAT ..." in said and "[OPTIONS] SRC DST" in said
    start = settings.Pretrain(data="x", lr=1.0, weight_decay_end=0.4)
    args = [
        "--lr",
        "unset",
        "--weight-decay-end",
        "None",
        "--resident",
        "auto",
        "--drops",
        ".1",
        ".2",
    ]
    parsed = flags.flagged(settings.Pretrain, args, "pretrain", "", start)
    assert (parsed.lr, parsed.weight_decay_end, parsed.resident) == (None, None, "auto")
    assert parsed.drops == (0.1, 0.2)
    assert flags.flagged(settings.Pretrain, ["--resident"], "", "", start).resident is True
    asked = judge.Linear(checkpoint="x", train="y", test="z")
    assert flags.flagged(judge.Linear, ["--nesterov", "no"], "", "", asked).nesterov is False


def test_a_slash_is_a_dot_in_flags():
    start = settings.Pretrain(data="x")
    for args in (["--views/gray", "0.1"], ["--views/gray=0.1"], ["--views.gray", "1e-1"]):
        assert flags.flagged(settings.Pretrain, args, "pretrain", "", start).views.gray == 0.1
    assert flags.flagged(settings.Pretrain, ["--data=a/b"], "", "", start).data == "a/b"


def test_a_resolved_config_replays_itself(tmp_path):
    from firstsight import methods

    for name in methods.names():
        _, defaults, own = methods.describe(name)
        start = settings.begun(defaults, own, {"size": 32}, "test")
        changed = dataclasses.replace(start, lr=1e-7, out="x", probe_test="scenes:test")
        values = yaml.safe_load(yaml.safe_dump(settings.plain(changed)))
        assert settings.merged(start, values, "replay") == changed


@pytest.mark.parametrize(
    ("options", "function"),
    [
        (judge.Knn, "evaluate.knn"),
        (judge.Linear, "evaluate.linear"),
        (judge.Finetune, "evaluate.finetune"),
        (judge.Dense, "evaluate.dense"),
        (judge.Instance, "evaluate.instance"),
        (health.Diagnose, "diagnose.run"),
        (health.Embed, "embed.run"),
    ],
)
def test_options_of_a_command_are_the_parameters_of_its_function(options, function):
    module, _, name = function.partition(".")
    function = getattr(importlib.import_module(f"firstsight.{module}"), name)
    parameters = dict(inspect.signature(function).parameters)
    del parameters["checkpoint_spec"]
    for field in dataclasses.fields(options):
        if field.name in ("checkpoint", "snapshots"):  # say what is read, not how
            continue
        default = parameters.pop(field.name).default
        if field.default is dataclasses.MISSING:
            assert default is inspect.Parameter.empty
        else:
            assert default == field.default
    assert not parameters


def test_bad_sources_are_one_sentence(tmp_path, capsys):
    base = ["pretrain", "simclr", "--backbone", "timm:test_resnet", "--size", "32"]
    base += ["--out", str(tmp_path / "run"), "--device", "cpu", "--data"]
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in failing(capsys, *base, str(tmp_path / "empty"))
    (tmp_path / "one").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "one" / "a.png")
    err = failing(capsys, *base, str(tmp_path / "one"))
    assert "1 image is too few to learn from" in err
    assert "nowhere" in failing(capsys, *base, "nowhere")


def test_an_unknown_backbone_is_named_with_its_nearest_match(tmp_path, capsys):
    base = ["pretrain", "simclr", "--data", "scenes:train@300", "--out", str(tmp_path / "r")]
    assert "did you mean 'resnet18'" in failing(capsys, *base, "--backbone", "resnet-18")
    assert "vit_tiny" in failing(capsys, *base, "--backbone", "timm:vit_tinny_patch16_224")


def test_knn_needs_a_checkpoint_and_labels(tmp_path, capsys):
    assert "no checkpoint nothing" in failing(
        capsys,
        "evaluate",
        "knn",
        "nothing",
        "--train",
        "scenes:train@20",
        "--test",
        "scenes:test@20",
    )
    for name in ("a", "b"):
        Image.new("RGB", (40, 40)).save(tmp_path / f"{name}.png")
    args = [
        "evaluate",
        "knn",
        "random:resnet18",
        "--test",
        "scenes:test@20",
        "--train",
        str(tmp_path),
    ]
    assert "has no labels" in failing(capsys, *args)


def test_knn_writes_what_it_prints(tmp_path, capsys):
    out = tmp_path / "knn.json"
    args = "evaluate knn random:resnet18 --train scenes:train@60 --test scenes:test@30 --size 32"
    cli.main([*args.split(), "--k", "1", "5", "60", "--json", str(out)])
    result = json.loads(out.read_text())
    assert list(result["k"]) == ["1", "5", "60"]
    assert result["images"] == {"train": 60, "test": 30}
    assert result["protocol"]["temperature"] == 0.07 and "versions" in result["protocol"]
    assert f"{result['k']['5']['top1']:.2f}" in capsys.readouterr().out


def test_protocols_offered_are_those_there_are():
    from typing import get_args, get_type_hints

    from firstsight.evaluate.finetune import TUNINGS
    from firstsight.evaluate.protocols import PROTOCOLS
    from firstsight.pairs import MODES

    for options, name, there in (
        (judge.Linear, "protocol", {*PROTOCOLS}),
        (judge.Finetune, "protocol", {*TUNINGS}),
        (health.Diagnose, "dataset_mode", {*MODES}),
        (judge.Instance, "dataset_mode", {*MODES, "all"}),
    ):
        assert set(get_args(get_type_hints(options)[name])) == there


def test_the_same_from_python():
    import firstsight

    assert firstsight.__all__ == sorted(firstsight.__all__)
    with pytest.raises(UserError, match="did you mean 'epochs'"):
        firstsight.pretrain("simclr", data="scenes:train@64", epohcs=1)
    backbone = firstsight.load_backbone("random:resnet18")
    assert (backbone.width, backbone.stride, backbone.name) == (512, 32, "resnet18")


def test_a_protocol_reads_as_words(capsys):
    protocol = {"k": [1, 5], "nesterov": False, "versions": {"torch": "2.9"}, "layer": None}
    shown.show("t", ["k"], [["1"]], {"protocol": protocol}, None)
    said = "protocol: k 1 5, nesterov no, versions (torch 2.9), layer none\n"
    assert capsys.readouterr().out.endswith(said)
