"""What a terminal shows, and the plain lines of a pipe."""

import io
import re
import time

from rich.console import Console

from niwaki.progress import Display


def show(*, terminal: bool) -> str:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=100)
    with Display(console) as display:
        display("start", blocks=2)
        display("warning", message="no calibration text given")
        display("block", index=0, of=2)
        display("block", index=1, of=2)
    return text.getvalue()


def test_a_terminal_sees_a_bar_with_time_left() -> None:
    shown = show(terminal=True)
    assert "compressing" in shown and "2/2" in shown and "left" in shown


def test_a_pipe_sees_one_plain_line_per_block() -> None:
    lines = show(terminal=False).splitlines()
    assert lines[0] == "note: no calibration text given"
    assert re.fullmatch(r"compressing: block 1/2, \d+\.\d s, \d+ s left", lines[1])
    assert re.fullmatch(r"compressing: block 2/2, \d+\.\d s, 0 s left", lines[2])
    assert len(lines) == 3


def test_many_token_counts_become_few_lines() -> None:
    text = io.StringIO()
    with Display(Console(file=text, width=100)) as display:
        for done in range(1, 201):
            time.sleep(0.001)
            display("sample", done=done * 10, of=2000)
    lines = text.getvalue().splitlines()
    assert 2 <= len(lines) <= 40
    assert lines[-1].startswith("writing calibration text: token 2000/2000")


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
