"""Files of version 0.1 are still read: comparisons, gates and benchmarks."""

import json
from pathlib import Path

import pytest

from niwaki.compression.run_record import read_run
from niwaki.errors import InputError
from niwaki.measure.bench.schema import read_bench, write_bench
from niwaki.measure.compare.gates import judge_comparison, load_gates
from niwaki.measure.report.layers import read_layers
from niwaki.measure.report.page import render
from niwaki.measure.schema import read_comparison, write_comparison
from niwaki.runtime.contextual.predictor_files import read_shadow

OLD = Path(__file__).parents[1] / "data" / "results_v0"


def test_a_comparison_is_read_judged_and_shown(tmp_path: Path) -> None:
    comparison = read_comparison(OLD / "compare.json")
    assert [one.model.name for one in comparison.candidates] == ["pruned", "packed"]
    assert judge_comparison(comparison, load_gates(OLD / "gate.yaml")) == comparison and comparison.passed is False
    records = {one.model.name: read_layers(OLD / one.model.name) for one in comparison.candidates}
    assert all(records.values()) and "2:4+4bit" in render(comparison, records, "en")
    write_comparison(tmp_path / "compare.json", comparison)
    assert (tmp_path / "compare.json").read_bytes() == (OLD / "compare.json").read_bytes()


def test_a_comparison_without_a_format_is_read(tmp_path: Path) -> None:
    content = json.loads((OLD / "compare.json").read_text())
    del content["format"]
    (tmp_path / "compare.json").write_text(json.dumps(content))
    assert read_comparison(tmp_path / "compare.json") == read_comparison(OLD / "compare.json")


def test_a_benchmark_of_forms_is_one_of_variants(tmp_path: Path) -> None:
    bench = read_bench(OLD / "bench.json")
    assert [row.variant for row in bench.rows] == ["dense", "packed", "quantized"] and bench.format == 2
    assert bench.settings.batches == (1, 2) and all(row.cells for row in bench.rows)
    write_bench(tmp_path / "bench.json", bench)
    assert '"variant": "packed"' in (tmp_path / "bench.json").read_text()
    assert read_bench(tmp_path / "bench.json") == bench


@pytest.mark.parametrize("text", ["[]", "{}", '{"format": 3}', '{"format": 1, "rows": [1]}', "no"])
def test_no_benchmark_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "bench.json").write_text(text)
    with pytest.raises(InputError, match="is not a benchmark of this niwaki"):
        read_bench(tmp_path / "bench.json")
    with pytest.raises(InputError, match="cannot read"):
        read_bench(tmp_path / "gone.json")


def edited(source: Path, folder: Path, version: int) -> Path:
    """Copy a JSON file to `folder` with another format."""
    target = folder / source.name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({**json.loads(source.read_text()), "format": version}))
    return target


@pytest.mark.parametrize(("version", "step"), [(-1, "write it again with this niwaki"), (9, "install a newer niwaki")])
def test_every_reader_says_what_to_do_with_another_format(version: int, step: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"has format {version}, this niwaki reads 1: {step}"):
        read_comparison(edited(OLD / "compare.json", tmp_path, version))
    with pytest.raises(InputError, match=rf"has format {version}, this niwaki reads 1 and 2: {step}"):
        read_bench(edited(OLD / "bench.json", tmp_path, version))
    edited(OLD / "packed/niwaki/run.json", tmp_path / "niwaki", version)
    with pytest.raises(InputError, match=rf"has format {version}, this niwaki reads 0 and 1: {step}"):
        read_run(tmp_path)
    edited(OLD / "shadowed/niwaki/shadow.json", tmp_path / "niwaki", version)
    with pytest.raises(InputError, match=rf"has format {version}, this niwaki reads 1 and 2: {step}"):
        read_shadow(tmp_path)
