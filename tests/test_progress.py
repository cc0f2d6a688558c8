"""What a terminal shows, and that a pipe stays quiet."""

import io

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


def test_a_pipe_sees_only_notes() -> None:
    assert show(terminal=False).strip() == "note: no calibration text given"
