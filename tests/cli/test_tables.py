"""Numbers are never cut, whatever the width; methods read well at any width."""

import io
from itertools import pairwise

import pytest
from rich.console import Console

from niwaki.cli.methods import print_method
from niwaki.cli.tables import print_table

HEADERS = ["data", "tokens", "perplexity", "dense", "ratio", "KL", "top-1"]
NUMBERS = ["1,234,567", "12345.678", "1234.567", "12.345", "1.2345", "50.00%"]
NAME = "a/long/path/to/some/held_out_text_file[1].jsonl"


def shown(*, width: int, terminal: bool) -> list[str]:
    console = Console(file=io.StringIO(), force_terminal=terminal, no_color=True, width=width)
    print_table(console, HEADERS, [[NAME, *NUMBERS]])
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("width", [20, 60, 80, 100, 300])
def test_numbers_stay_whole_and_the_name_folds(width: int, terminal: bool) -> None:
    lines = shown(width=width, terminal=terminal)
    first = next(line for line in lines if NUMBERS[0] in line)
    assert all(number in first for number in NUMBERS)
    assert "…" not in "".join(lines)
    rows = lines[lines.index(first) :]
    name = "".join(row.strip("│ ").split()[0] for row in rows if row.strip("│ └─┴┘"))
    assert name == NAME
    assert (NAME in first) == (not terminal or width == 300)


def test_a_table_that_fits_is_no_wider_than_the_terminal() -> None:
    assert max(map(len, shown(width=80, terminal=True)[2:])) <= 80


@pytest.mark.parametrize("width", [60, 80, 120])
def test_paragraphs_fill_the_width_and_commands_stay_on_one_line(width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    print_method(console, "sparsegpt")
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    text = [line for line in lines if not line.startswith("    ")]
    assert max(map(len, text)) <= width
    following = text[2:]
    # no line is short because the docstring's own line ended there: the next word would not have fitted
    for line, after in pairwise(following):
        if line and after:
            assert len(line) + 1 + len(after.split()[0]) > width
    command = "    niwaki compress MODEL OUT --method sparsegpt --target 2:4 --calibration mine.txt --seq-len 512"
    assert command in lines
    assert any("--set damping_frac=0.01" in line for line in lines)
