"""A model that changes while transformers or another process runs it is noticed, and nothing is published."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import niwaki
from niwaki.compression.recover import recover
from niwaki.errors import CheckpointError
from niwaki.measure.bench import timing
from niwaki.runtime.contextual.predictor_files import TENSORS
from support.changes import replace, write_with_old_times
from support.models import run, tiny_llama, write_texts
from support.tasks import questions, write_task

SHARD = "model.safetensors"
FAST: dict[str, Any] = {"batches": (1,), "context": 4, "new_tokens": 2, "prompt_tokens": 0, "rounds": 1}
SMALL: dict[str, Any] = {"steps": 2, "batch": 2, "seq_len": 16, "rank": 2, "rate": 0.02}
CHANGES = [write_with_old_times, replace]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "model", blocks=1)


@pytest.fixture
def result(model: Path, tmp_path: Path) -> Path:
    niwaki.compress(model, tmp_path / "result", method="magnitude", target="2:4", device="cpu")
    return tmp_path / "result"


def shard_of(folder: Path) -> Path:
    return max(folder.glob("*.safetensors"))


class Changing:
    """Report that changes a file at the first of an event."""

    def __init__(self, event: str, path: Path, change: Callable[[Path], None]) -> None:
        self.event, self.path, self.change, self.done = event, path, change, False

    def __call__(self, event: str, **fields: Any) -> None:
        if event == self.event and not self.done:
            self.done = True
            self.change(self.path)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("which", ["dense", "result"])
def test_bench(
    model: Path, result: Path, change: Callable[[Path], None], which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "CPU_BYTES", 2**20)
    report = Changing("bench", shard_of(model if which == "dense" else result), change)
    kept: list[Any] = []
    with pytest.raises(CheckpointError, match="changed while it was read"):
        niwaki.bench(model, [result], variants=["4bit"], device="cpu", report=report, keep=kept.append, **FAST)
    assert report.done and not kept


def test_the_command_writes_nothing_then(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from niwaki.measure.bench import benchmark

    measure = benchmark.measure

    def measured(*given: Any) -> Any:
        replace(model / SHARD)
        return measure(*given)

    monkeypatch.setattr(timing, "CPU_BYTES", 2**20)
    monkeypatch.setattr(benchmark, "measure", measured)
    flags = ["--variants", "4bit", "--batch", 1, "--context", 4, "--new", 2, "--prompt", 0, "--rounds", 1]
    code, _, said = run(capsys, "bench", model, *flags, "--device", "cpu", "--json", tmp_path / "bench.json")
    assert (
        code == 2 and "changed while it was read" in " ".join(said.split()) and not (tmp_path / "bench.json").exists()
    )


def test_recover(result: Path, tmp_path: Path) -> None:
    text = str(write_texts(tmp_path / "text.jsonl"))
    for change in CHANGES:
        report = Changing("recover", shard_of(result), change)
        with pytest.raises(CheckpointError, match="changed while it was read"):
            recover(result, tmp_path / "out", data=text, report=report, device="cpu", **SMALL)
        assert report.done and not (tmp_path / "out").exists()


@pytest.mark.parametrize("which", ["model", "reference"])
def test_lm_eval(model: Path, result: Path, tmp_path: Path, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval

    evaluated, data = lm_eval.simple_evaluate, write_task(tmp_path / "tasks", questions(2))
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)

    def evaluate(**given: Any) -> Any:
        write_with_old_times(shard_of(result if which == "model" else model))
        return evaluated(**given)

    monkeypatch.setattr(lm_eval, "simple_evaluate", evaluate)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        niwaki.evaluate(result, reference=model, lm_eval="mine", include_path=data.parent, device="cpu")


def test_compare_while_processes_run(
    model: Path, result: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leave the processes out: each takes seconds to start."""

    def whole(job: Any, folders: Any, dense: Any, candidates: Any, prompts: Any) -> Any:
        write_with_old_times(model / SHARD)
        return dense, tuple(candidates)

    text = write_texts(tmp_path / "text.jsonl")
    monkeypatch.setattr("niwaki.measure.compare.comparison._Job._measure_whole", whole)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        niwaki.compare(
            model, result, data=text, seq_len=16, max_tokens=64, rounds=1, prompt_tokens=4, new_tokens=2, device="cpu",
            report=tmp_path / "report",
        )  # fmt: skip
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("part", ["weights", "predictor"])
def test_compare_of_a_contextual_result(model: Path, tmp_path: Path, part: str) -> None:
    text = write_texts(tmp_path / "text.jsonl")
    niwaki.compress(
        model, tmp_path / "out", method="shadow", target="0.5", device="cpu",
        options={"unit": "prompt", "min_prompt": 4, "features": "last", "size_frac": 0.5},
        calibration={"files": (str(text),), "samples": 8, "seq_len": 32},
    )  # fmt: skip

    path = shard_of(tmp_path / "out") if part == "weights" else tmp_path / "out" / TENSORS
    report = Changing("compare", path, write_with_old_times)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        niwaki.compare(
            model, tmp_path / "out", data=text, seq_len=16, max_tokens=64, rounds=0, device="cpu",
            report=tmp_path / "report", progress=report,
        )  # fmt: skip
    assert report.done and not (tmp_path / "report").exists()


def test_an_export_that_loads_the_whole_model(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the tracer out: it takes most of the time of such an export."""
    traced = SimpleNamespace(
        save=lambda path, external_data: path.write_bytes(b""), model=SimpleNamespace(opset_imports={"": 18})
    )
    monkeypatch.setattr("niwaki.exporters.onnx_graph._traced", lambda model, checkpoint: traced)
    report = Changing("export", model / SHARD, write_with_old_times)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        niwaki.export(model, tmp_path / "out", to="onnx", report=report)
    assert report.done and not (tmp_path / "out").exists()


def test_a_text_that_the_model_samples_is_of_the_same_weights(model: Path, tmp_path: Path) -> None:
    report = Changing("sample", model / SHARD, replace)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        niwaki.compress(
            model, tmp_path / "out", method="wanda", target="2:4", device="cpu", report=report,
            calibration={"samples": 2, "seq_len": 8},
        )  # fmt: skip
    assert report.done and not (tmp_path / "out").exists()


def test_a_touch_passes(model: Path, result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "CPU_BYTES", 2**20)
    report = Changing("bench", model / SHARD, Path.touch)
    assert niwaki.bench(model, [result], device="cpu", report=report, **FAST).rows[1].decode
    assert report.done
