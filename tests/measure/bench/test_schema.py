"""What seconds become, and two tables as one."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console

from niwaki.cli.bench import print_bench
from niwaki.errors import InputError
from niwaki.measure.bench.plot import draw
from niwaki.measure.bench.schema import Bench, BenchSettings, Cell, Row, make_cell, merge_benches, with_all_rounds
from niwaki.measure.schema import Environment

SETTINGS = BenchSettings(
    device="cpu", dtype="bfloat16", threads=2, batches=(1, 4), context=16, new_tokens=8, prompt_tokens=64,
    rounds=3, seconds=60.0, steps="one call after another",
)  # fmt: skip
ENVIRONMENT = Environment(
    machine="x86_64", processor="a processor", cores=2, memory_bytes=2**34, accelerator=None, system="Linux",
    python="3.11", versions={"torch": "2.13"},
)  # fmt: skip


def timed(batch: int, dense: list[float], own: list[float], kernel: str = "AVX2") -> Cell:
    return make_cell(batch, 8 * batch, dense, own, kernel, steps=8, read_bytes=1000, bandwidth=16000.0)


def table(*rows: Row, **changes: Any) -> Bench:
    return Bench(
        version="0.1", date="2026-01-01", model="m", architecture="LlamaForCausalLM", blocks=2, parameters=100,
        random_weights=True, quality="not measured", environment=ENVIRONMENT,
        settings=SETTINGS.model_copy(update=changes), rows=rows,
    )  # fmt: skip


def test_a_cell_is_medians_of_rounds_and_of_their_ratios() -> None:
    found = timed(4, [4.0, 2.0, 8.0], [2.0, 2.0, 1.0])
    assert found.tokens_per_s == (16.0, 16.0, 32.0) and found.dense_tokens_per_s == (8.0, 16.0, 4.0)
    assert found.median_tokens_per_s == 16 and found.spread_frac == 1
    assert found.speedup.value == 2 and found.speedup.units == 3 and found.speedup.low is None
    # 8 steps of 1000 bytes in 2 seconds, of 16000 bytes a second
    assert found.bandwidth_share == 0.25


def test_a_share_needs_bytes_and_a_rate() -> None:
    assert make_cell(1, 8, [1.0], [1.0], "torch", steps=8, read_bytes=None, bandwidth=1.0).bandwidth_share is None
    assert make_cell(1, 8, [1.0], [1.0], "torch", steps=8, read_bytes=5).bandwidth_share is None


def test_the_dense_row_has_the_rounds_of_all_turns() -> None:
    dense = Row(variant="dense", about="as it is", decode=(timed(1, [1.0], [1.0], "torch"),))
    others = [
        Row(variant="bitmap", about="", decode=(timed(1, [1.0], [0.5]),)),
        Row(variant="2:4", about="", decode=(timed(1, [2.0, 4.0], [0.5, 0.5]),)),
        Row(variant="contextual", about="", reason="it cannot be"),
    ]
    found = with_all_rounds(dense, others).decode[0]
    assert found.tokens_per_s == (8.0, 4.0, 2.0) and found.median_tokens_per_s == 4
    assert found.speedup.value == 1
    assert dense.decode[0].bandwidth_share == 0.5 and found.bandwidth_share == 0.25


def test_pieces_of_a_table_become_one() -> None:
    dense = Row(variant="dense", about="as it is", peak_bytes=5, decode=(timed(1, [1.0], [1.0], "torch"),))
    old = table(dense, Row(variant="2:4", about="", peak_bytes=7, decode=(timed(1, [1.0], [0.5]),)), prompt_tokens=0)
    read = make_cell(1, 64, [4.0], [2.0], "decoded, then torch")
    dense_read = dense.model_copy(
        update={"decode": (), "peak_bytes": 9, "prefill": make_cell(1, 64, [4.0], [4.0], "torch")}
    )
    new = table(dense_read, Row(variant="2:4", about="", peak_bytes=6, prefill=read), batches=(), new_tokens=64)
    found = merge_benches(old, new)
    assert [row.variant for row in found.rows] == ["dense", "2:4"]
    assert found.rows[1].prefill == read and found.rows[1].decode == old.rows[1].decode
    assert [row.peak_bytes for row in found.rows] == [9, 7]
    assert found.rows[1].columns(found.settings) == [old.rows[1].decode[0], None, read]
    assert found.settings.new_tokens == 8 and found.settings.batches == (1, 4) and found.settings.prompt_tokens == 64
    again = merge_benches(found, table(dense, Row(variant="2:4", about="", decode=(timed(1, [3.0], [1.0]),))))
    assert again.rows[1].decode[0].speedup.value == 3 and again.rows[0].decode[0].tokens_per_s == (8 / 3,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threads": 1}, "threads was 2, now it is 1"),
        ({"dtype": "float32"}, "dtype was"),
        ({"new_tokens": 9}, "new_tokens was 8, now it is 9"),
    ],
)
def test_other_settings_are_another_table(changes: dict[str, Any], message: str) -> None:
    dense = Row(variant="dense", about="as it is")
    with pytest.raises(InputError, match=message):
        merge_benches(table(dense), table(dense, **changes))


def test_json_comes_back_whole_and_nothing_else_is_read() -> None:
    found = table(Row(variant="dense", about="as it is", decode=(timed(1, [1.0], [1.0]),)))
    text = found.model_dump_json()
    assert Bench.model_validate_json(text) == found
    with pytest.raises(ValidationError):
        Bench.model_validate({**json.loads(text), "more": 1})


def test_a_plot_is_drawn_of_what_there_is_and_is_the_same_every_time(tmp_path: Path) -> None:
    row = Row(variant="2:4", about="", weight_bytes=10, peak_bytes=20, decode=(timed(4, [1.0], [0.5]),))
    found = table(
        Row(variant="dense", about="", decode=(timed(1, [1.0], [1.0]),)), row, Row(variant="x", about="", reason="no")
    )
    drawn = []
    for name in ("one.svg", "other.svg"):
        draw(found, tmp_path / name)
        drawn.append((tmp_path / name).read_bytes())
    assert drawn[0] == drawn[1] and b"2:4" in drawn[0] and sorted(p.name for p in tmp_path.iterdir()) == [
        "one.svg", "other.svg"
    ]  # fmt: skip


def test_slower_is_said_of_what_is_slower_in_every_round() -> None:
    dense = Row(variant="dense", about="as it is", decode=(timed(1, [1.0], [1.0], "torch"),))
    sure = Row(variant="2:4", about="", decode=(timed(1, [1.0, 1.0, 1.0], [1.5, 1.1, 2.0]),))
    noise = Row(variant="bitmap", about="", decode=(timed(1, [1.0, 2.0, 1.0], [1.5, 1.1, 2.0]),))
    console = Console(width=200, record=True, file=io.StringIO())
    print_bench(console, table(dense, sure, noise))
    text = console.export_text()
    assert "2:4 is slower than dense: decode ×1" in text and "bitmap is slower" not in text
