"""What is read of blocks.jsonl."""

import json
from pathlib import Path

import pytest

from niwaki.errors import CheckpointError
from niwaki.measure.report.layers import layers_of, read_layers
from support.reports import lines, records


def test_a_measure_is_there_where_it_says_something() -> None:
    assert set(layers_of(records(lines("codes"))).measures) == {"bits", "error"}
    assert set(layers_of(records(lines("masked"))).measures) == {"zeros", "error"}
    assert set(layers_of(records(lines("sliced"))).measures) == {"kept", "error"}


def test_values_stand_by_projection_and_block() -> None:
    found = layers_of(records(lines("masked")))
    zeros = found.measures["zeros"]
    assert zeros.projections == ("self_attn.q_proj", "mlp.down_proj") and zeros.blocks == (0, 1, 2)
    assert zeros.values == ((0.25,) * 3, (0.5,) * 3)
    assert layers_of(records(lines("sliced"))).measures["kept"].values == ((0.5,) * 3, (0.625,) * 3)
    assert found.growth == pytest.approx({0: 0.1, 1: 0.2, 2: 0.3}) and found.drift == {}
    assert layers_of(records(lines("masked", drift=True))).drift == pytest.approx({0: 0.2, 1: 0.4, 2: 0.6})


def test_a_block_without_a_matrix_and_experts() -> None:
    made = lines("codes")
    made = [line for line in made if (line["block"], line["matrix"]) != (1, "mlp.down_proj")]
    experts = [{**made[0], "matrix": f"mlp.experts.{n}.up_proj", "bits": bits} for n, bits in enumerate((2.0, 4.0))]
    bits = layers_of(records([*made, *experts])).measures["bits"]
    assert bits.values[bits.projections.index("mlp.down_proj")] == (4.25, None, 4.25)
    assert bits.values[bits.projections.index("mlp.experts.*.up_proj")] == (3.0, None, None)


def test_codes_that_are_stored_as_plain_weights_count_what_they_take() -> None:
    made = [{k: v for k, v in line.items() if k != "stored"} | {"bits": 16.0} for line in lines("codes")]
    assert layers_of(records(made)).measures["bits"].known == [16.0] * 6


def test_reading(tmp_path: Path) -> None:
    assert read_layers(tmp_path) is None
    (tmp_path / "niwaki").mkdir()
    path = tmp_path / "niwaki" / "blocks.jsonl"
    path.write_text("")
    empty = read_layers(tmp_path)
    assert empty is not None and not empty.lines and not empty.measures
    path.write_text("".join(json.dumps(line) + "\n" for line in lines()))
    assert len(read_layers(tmp_path).lines) == 6
    for broken in ("{", "[]", json.dumps({k: v for k, v in lines()[0].items() if k != "bits"})):
        path.write_text(broken + "\n")
        with pytest.raises(CheckpointError, match=r"blocks.jsonl is not a record of niwaki.*compress again"):
            read_layers(tmp_path)
