"""How a long run shows that it lives: a line a minute where there is no terminal."""

from __future__ import annotations

import itertools
import re

import pytest
from helpers import CPU, batches_of, make_folder, random_model

from utils.data.small import load_data
from utils.finetune import Callback, fit
from utils.progress import progress
from utils.recipes import Recipe


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by 25 seconds whenever somebody looks."""
    times = itertools.count(0, 25)
    monkeypatch.setattr("time.perf_counter", lambda: float(next(times)))
    return times


def test_a_line_a_minute_tells_how_far_it_is(clock, capsys):
    asked = []

    def status(seconds):
        asked.append(seconds)
        return "all well"

    assert list(progress(iter("abcdefghij"), "letters", 10, status)) == list("abcdefghij")
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [
        "letters 3/10, all well, 0:02:55 left",
        "letters 6/10, all well, 0:01:40 left",
        "letters 9/10, all well, 0:00:25 left",
    ]
    assert asked == [75, 150, 225] and not shown.err
    assert list(progress(iter("ghij"), "letters", 10, done=6)) == list("ghij")
    assert capsys.readouterr().out == "letters 9/10, 0:00:25 left\n"


def test_a_short_loop_and_another_rank_say_nothing(clock, capsys, monkeypatch):
    assert list(progress("ab", "letters", 2)) == ["a", "b"]
    monkeypatch.setenv("RANK", "1")
    assert list(progress("abcdefghij", "letters", 10)) == list("abcdefghij")
    shown = capsys.readouterr()
    assert not shown.out and not shown.err


def test_a_terminal_has_a_bar_and_no_lines(clock, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert list(progress("abcd", "letters", 4, lambda seconds: "all well")) == list("abcd")
    shown = capsys.readouterr()
    assert not shown.out and "letters |" in shown.err and "0/4" in shown.err
    assert "all well" in shown.err


def test_a_closed_pipe_does_not_end_the_loop(clock, monkeypatch):
    def closed(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", closed)
    assert list(progress("abcd", "letters", 4)) == list("abcd")


def test_training_and_evaluation_are_followed(clock, capsys):
    """Also from the middle of an epoch: the speed counts only the images from there."""
    states = []

    class Keep(Callback):
        def after_batch(self, batch, state):
            states.append(state())

    recipe, model = Recipe(1, 0.01, 0, milestones=(), gamma=1), random_model("gateresnet20")
    data = batches_of(load_data("synthetic", "unused", 8), 100, limit_train=6)
    train, test = data.train, data.train
    fit(model, train, test, recipe, CPU, callback=Keep())
    line = r"^%s, batch %d/6, loss [\d.]+, [\d.]+ %%, 4 images/s, 0:0%s left$"
    shown = capsys.readouterr().out
    for title in ("epoch 1/1", "evaluate"):
        for number, left in ((3, "1:15"), (6, "0:00")):
            assert re.search(line % (title, number, left), shown, re.MULTILINE), (title, shown)
    fit(model, train, test, recipe, CPU, resume=states[1])
    shown = capsys.readouterr().out
    assert re.search(line % ("epoch 1/1", 5, "0:25"), shown, re.MULTILINE), shown


def test_reading_images_is_followed(clock, capsys, tmp_path):
    load_data("folder", make_folder(tmp_path, size=(8, 8)), 8)
    assert capsys.readouterr().out.splitlines()[0] == "reading images 3/24, 0:08:45 left"
