"""The embedded default: the model and texts are there, and its table is measured, not written."""

from pathlib import Path

import pytest

from niwaki import demo


def test_demo_compresses_and_compares_the_sapling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "SAMPLES", 8)
    monkeypatch.setattr(demo, "EVALUATION_TOKENS", 4 * demo.SEQ_LEN)
    found = demo.run_demo(tmp_path / "new" / "out")
    assert found["zeros_frac"] == 0.5
    dense, pruned = found["perplexity"]
    assert 5 < dense < 40  # a trained model, not a random one (which would score about 4096)
    assert dense < pruned < 5 * dense
    assert 0 < found["kl"] < 3 and 0.3 < found["top1_agreement"] < 1
    assert found["bytes"][0] == (demo.sapling() / "model.safetensors").stat().st_size


def test_sapling_is_whole() -> None:
    names = {path.name for path in demo.sapling().iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
