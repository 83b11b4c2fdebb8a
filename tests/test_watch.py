"""Heartbeats, and what ranks conclude from each other's; with processes: test_killed.py."""

import json
import os
import socket
import subprocess
import sys

import pytest

from firstsight import distributed
from firstsight.engine.watch import Watch

TIMEOUT = 60.0  # a look every two seconds


def one_of_two(folder, monkeypatch):
    """The watch of rank 0, whose main thread waits for rank 1 at step 7."""
    monkeypatch.setattr(distributed, "world", lambda: 2)
    watch = Watch(folder, TIMEOUT)
    (folder / "watch").mkdir()
    watch._move(7, "trains")
    return watch


def beats(folder, count, pid, **more):
    """Rank 1 writes a heartbeat."""
    said = {"rank": 1, "step": 7, "doing": "trains", "beat": count, "pid": pid}
    text = json.dumps(said | {"host": socket.gethostname()} | more)
    (folder / "watch" / "rank-0001.json").write_text(text)


def looks_until_it_ends(watch, monkeypatch, most=99):
    """How often the watch looked before it ended the run, and what it said; (most, ''): never."""
    said = []
    monkeypatch.setattr(watch, "_end", said.append)
    for look in range(most):
        watch._look()
        if said:
            return look, said[0]
    return most, ""


@pytest.fixture(scope="module")
def dead():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


def test_whoever_reads_a_heartbeat_reads_a_whole_one(tmp_path, monkeypatch):
    """It is replaced, not overwritten: what was open before stays as it was."""
    watch = one_of_two(tmp_path, monkeypatch)
    watch._write()
    with open(tmp_path / "watch" / "rank-0000.json") as before:
        watch._write()
        assert json.loads(before.read())["beat"] == 1
    assert [path.name for path in (tmp_path / "watch").iterdir()] == ["rank-0000.json"]
    assert watch._said(0)["beat"] == 2


def test_a_rank_that_died_is_gone_long_before_the_time_limit(tmp_path, monkeypatch, dead):
    watch = one_of_two(tmp_path, monkeypatch)
    beats(tmp_path, 3, dead)
    looks, said = looks_until_it_ends(watch, monkeypatch)
    assert 10 <= looks <= 12 and "rank 1 of 2 is gone (it trains, then fell silent)" in said
    assert f"at step 7, process {dead} on {socket.gethostname()}" in said


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_a_silent_rank_that_may_be_alive_has_the_time_limit(where, tmp_path, monkeypatch, dead):
    """Stopped in a debugger, or behind a slow file system: here its process is seen to live."""
    watch = one_of_two(tmp_path, monkeypatch)
    here = {"pid": os.getpid()} if where == "here" else {"pid": dead, "host": "node7"}
    beats(tmp_path, 3, **here)
    looks, said = looks_until_it_ends(watch, monkeypatch)
    assert looks == TIMEOUT / 2 + 1
    assert "rank 1 of 2 hangs: it trains for 62 s, its heartbeat stands still, at step 7" in said


def test_a_silent_rank_amid_a_reading_has_the_time_limit_too(tmp_path, monkeypatch):
    """A reading may take long, but not in silence."""
    watch = one_of_two(tmp_path, monkeypatch)
    watch.reads()
    beats(tmp_path, 3, os.getpid(), doing="reads the backbone")
    looks, said = looks_until_it_ends(watch, monkeypatch)
    assert TIMEOUT / 2 < looks < TIMEOUT / 2 + 4
    assert "rank 1 of 2 hangs: it reads the backbone for 64 s, its heartbeat stands still" in said


def test_a_slow_rank_is_waited_for_and_then_named(tmp_path, monkeypatch):
    """It compiles its first step: its heart beats, and no step is taken."""
    watch = one_of_two(tmp_path, monkeypatch)
    count = iter(range(99))
    listen = watch._listen

    def beating():
        beats(tmp_path, next(count), os.getpid(), step=6)
        listen()

    monkeypatch.setattr(watch, "_listen", beating)
    looks, said = looks_until_it_ends(watch, monkeypatch)
    assert looks == TIMEOUT / 2 + 1 and "rank 1 of 2 hangs: it trains for 62 s, at step 6" in said


def test_where_a_connection_broke_the_silent_one_is_gone(tmp_path, monkeypatch, dead):
    """On another machine, where nobody here can ask whether its process lives."""
    watch = one_of_two(tmp_path, monkeypatch)
    beats(tmp_path, 3, dead, host="node7")
    watch._still, watch._broken = 1, True
    for _ in range(12):
        watch._listen()
    assert watch._gone() == [1] and "rank 1 of 2 is gone" in watch._verdict()


def test_what_one_rank_concluded_the_others_say_too(tmp_path, monkeypatch):
    watch = one_of_two(tmp_path, monkeypatch)
    beats(tmp_path, 3, os.getpid(), doing="has ended: rank 5 of 8 is gone (it trains, then ...)")
    looks, said = looks_until_it_ends(watch, monkeypatch)
    assert looks < 5 and said == "rank 5 of 8 is gone (it trains, then ...)"


def test_a_scale_below_one_is_said_once(tmp_path, capsys):
    watch = Watch(tmp_path, 60)
    for scale in (65536.0, 1.0, 0.5, 0.25):
        watch.note({"loss_scale": scale})
    said = capsys.readouterr().err
    assert said.count("again and again") == said.count("its scale is 0.5 at step 0") == 1
