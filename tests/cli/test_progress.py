"""What a terminal shows, and the plain lines of a pipe."""

import io
import re
import time

import pytest
from rich.console import Console

from niwaki.cli.progress import Display


def show(*, terminal: bool) -> str:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=100)
    with Display(console) as display:
        display("start", blocks=3)
        display("warning", message="no calibration text given")
        for index in range(3):
            display("block", index=index, of=3)
    return text.getvalue()


def test_a_terminal_sees_a_bar_with_time_left() -> None:
    shown = show(terminal=True)
    assert "compressing" in shown and "3/3" in shown and "left" in shown


def test_a_pipe_sees_one_plain_line_per_block_and_no_time_left_before_the_second() -> None:
    lines = show(terminal=False).splitlines()
    assert lines[0] == "note: no calibration text given"
    assert re.fullmatch(r"compressing: block 1/3, \d+\.\d s", lines[1])
    assert re.fullmatch(r"compressing: block 2/3, \d+\.\d s, \d+ s left", lines[2])
    assert re.fullmatch(r"compressing: block 3/3, \d+\.\d s", lines[3])
    assert len(lines) == 4


def test_the_time_left_is_that_of_the_blocks_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 s for the first block, 2 s for every other: 6 s are left after the second of five."""
    now = iter([0.0, 100.0, 102.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    text = io.StringIO()
    display = Display(Console(file=text, width=100))
    display("block", index=0, of=5)
    display("block", index=1, of=5)
    lines = text.getvalue().splitlines()
    assert lines == ["compressing: block 1/5, 100.0 s", "compressing: block 2/5, 2.0 s, 6 s left"]


def test_a_walk_backwards_and_a_second_trial_are_told_and_counted_by_themselves() -> None:
    text = io.StringIO()
    with Display(Console(file=text, width=100)) as display:
        for event in ("inputs", "gradients", "activations", "trying", "trying"):
            for index in range(2):
                display(event, index=index, of=2)
    told = text.getvalue().splitlines()
    assert "gradients of the loss, last block to first: block 2/2" in told[3]
    assert [line.rpartition(": ")[2][:9] for line in told] == ["block 1/2", "block 2/2"] * 5
    assert "left" not in "".join(told), "a second trial has a first block again"


def test_many_token_counts_become_few_lines() -> None:
    text = io.StringIO()
    with Display(Console(file=text, width=100)) as display:
        for done in range(1, 201):
            time.sleep(0.001)
            display("sample", done=done * 10, of=2000)
    lines = text.getvalue().splitlines()
    assert 2 <= len(lines) <= 40
    assert lines[-1].startswith("generating calibration text: token 2000/2000")


def test_every_shape_on_trial_is_told_and_a_second_stage_counts_anew() -> None:
    text = io.StringIO()
    with Display(Console(file=text, width=200)) as display:
        display("trial", shape={"neurons": 24, "heads": 2, "dropped": [1]}, loss=2.5)
        display("trial", shape={"neurons": [24, 16], "heads": [2, 1]}, loss=2.25)
        display("block", index=0, of=3)
        display("start", blocks=2)
        display("block", index=1, of=2)
    lines = text.getvalue().splitlines()
    assert lines[0] == "tried 24 neurons and 2 groups of heads without blocks 1: loss 2.5000"
    assert lines[1] == "tried 24, 16 neurons and 2, 1 groups of heads: loss 2.2500"
    assert lines[2].startswith("compressing: block 1/3") and lines[3].startswith("compressing: block 2/2")
