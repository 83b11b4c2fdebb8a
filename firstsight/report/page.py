"""The page: what is said about runs, and in which order. All text from files is escaped here."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from html import escape
from importlib.resources import files

from firstsight.report import detection
from firstsight.report.answers import answers
from firstsight.report.came_out import header
from firstsight.report.confused import confusions
from firstsight.report.kept import each, together
from firstsight.report.looks import all_pictures, script
from firstsight.report.read import Run
from firstsight.report.tables import differences, readings, section, settings, typed
from firstsight.report.went import curves

# The browser is told to load nothing and to run nothing (but the script of a map, by its hash),
# whatever text came out of the files.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(runs: Sequence[Run]) -> str:
    """The whole report as HTML."""
    style = files("firstsight.report").joinpath("style.css").read_text()
    allowed, more_style, map_script = script(runs)
    lone = runs[0] if len(runs) == 1 else None
    title = _title(lone) if lone else f"{len(runs)} runs compared"
    body = [
        header(title, runs),
        section("In short", answers([run for run in runs if not run.detects])),
        *(section(title, content) for title, content in detection.sections(runs)),
        section("Curves", curves(runs)),
        *all_pictures(runs),
        section("Readings", together(runs) + readings(runs) + each(runs) + confusions(runs)),
        section("Settings", settings(lone) if lone else differences(runs)),
        section("Use it", "".join(_use(run, lone is not None) for run in runs if not run.detects)),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}{allowed}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)} · firstsight</title>\n"
        f"<style>\n{style}{more_style}</style>\n</head>\n"
        f"<body>\n<main>\n{''.join(body)}</main>\n{map_script}</body>\n</html>\n"
    )


def _title(run: Run) -> str:
    data = run.settings.get("data")
    return f"{run.method} on {data}" if data else run.method


def _use(run: Run, alone: bool) -> str:
    head = "" if alone else f"<h3>{escape(run.label)}</h3>\n"
    config = shlex.quote(str(run.path / "config.yaml"))
    again = shlex.quote(f"{run.path}-again")
    command = f"firstsight pretrain {shlex.quote(run.method)} --config {config} --out {again}"
    width, side = run.about.get("width", "C"), run.settings.get("size", "H")
    load = (
        "import firstsight\n"
        f"backbone = firstsight.load_backbone({str(run.path)!r})\n"
        f"features = backbone.features(images)  # (B, {width}) from (B, 3, {side}, {side})"
    )
    norm = ""
    if (mean := run.about.get("mean")) and (std := run.about.get("std")):
        norm = (
            f"<p>Images are RGB with values in 0 to 1, minus mean {escape(typed(mean))}, "
            f"over deviation {escape(typed(std))}.</p>\n"
        )
    return (
        f"{head}<p>Load the backbone:</p>\n"
        f'<pre tabindex="0"><code>{escape(load)}</code></pre>\n{norm}'
        f'<p>Run it again, with the same settings:</p>\n<pre tabindex="0"><code>'
        f"{escape(command)}</code></pre>\n"
    )
