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
