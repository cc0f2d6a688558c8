"""Bytes of models with matrices that have no packed form, and of wrappers: said before the work, and right."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import niwaki
from niwaki.compression.plan.planner import plan
from support.families import build, families
from support.models import add_tokenizer, tiny_llama
from support.wrappers import wrappers, write

TRANSPOSED, EXPERTS = "stored transposed", "slices of fused experts"
CODES: dict[str, Any] = {"method": "rtn", "target": "4bit", "options": {"group": 0}}
ZEROS: dict[str, Any] = {"method": "magnitude", "target": "2:4", "pack": "auto"}


def family(name: str, folder: Path) -> Path:
    """Save a tiny model of a family or a wrapper in bfloat16, with a tokenizer."""
    if name in wrappers():
        return write(wrappers()[name], folder, torch.bfloat16)
    config = families()[name].config
    config.vocab_size = 4096
    build(config, torch.bfloat16).save_pretrained(folder)
    add_tokenizer(folder)
    return folder


@pytest.mark.parametrize(
    "name, recipe, reasons",
    [
        ("gpt2", CODES, {TRANSPOSED: 12}),
        ("gpt2", ZEROS, {TRANSPOSED: 12}),
        ("gpt2", {**CODES, "pack": "none"}, {}),
        ("qwen3_moe", CODES, {EXPERTS: 16}),  # one block has no experts
        ("mixtral", ZEROS, {EXPERTS: 24}),
        ("qwen3_vl_moe", CODES, {EXPERTS: 16}),
        ("qwen2_vl", {**CODES, "embeddings": "4bit"}, {}),
        ("gemma3", ZEROS, {}),
        ("falcon", CODES, {}),
    ],
)
def test_what_has_no_packed_form_is_said_with_its_bytes_before_the_work(
    name: str, recipe: dict[str, Any], reasons: dict[str, int], tmp_path: Path
) -> None:
    folder = family(name, tmp_path / "model")
    planned = plan(folder, **recipe)
    warnings: list[str] = []

    def report(event: str, **fields: Any) -> None:
        warnings.extend([fields["message"]] if event == "warning" else [])

    record = niwaki.compress(folder, tmp_path / "out", device="cpu", report=report, **recipe)
    assert planned["output_bytes"] == pytest.approx(record["result"]["bytes"], rel=0.02)
    assert planned["dense"]["reasons"] == reasons
    said = [text for text in warnings if "have no packed form" in text]
    assert said == [text for text in planned["warnings"] if "have no packed form" in text]
    assert len(said) == bool(reasons)
    for reason, count in reasons.items():
        assert f"{count} {reason}" in said[0]
        assert record["result"]["matrices"] - record["result"]["packed"] == count


def test_the_bytes_of_the_packed_form_are_those_of_a_model_that_has_it(tmp_path: Path) -> None:
    """The matrices of a Llama with the widths of the transposed ones would take what the plan says."""
    dense = plan(family("gpt2", tmp_path / "gpt2"), **CODES)["dense"]
    widths = {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
    record = niwaki.compress(tiny_llama(tmp_path / "m", **widths), tmp_path / "out", device="cpu", **CODES)
    gate = 3 * 128 * 32 * record["result"]["bits"] / 8  # a third matrix of the dense layer
    packed_bytes = record["result"]["weights"] * record["result"]["bits"] / 8 - gate
    assert dense["packed_bytes"] == pytest.approx(packed_bytes, rel=0.02)
    assert dense["bytes"] == 3 * 12 * 32 * 32 * 2


def test_a_tower_of_another_dtype_does_not_change_the_sizes_of_the_text_model(tmp_path: Path) -> None:
    """Most bytes of the file are float32, and the text model is bfloat16."""
    folder = family("llava", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    towers = [name for name in tensors if "vision_tower" in name]
    wide = {name: tensors[name].float() if name in towers else tensors[name] for name in tensors}
    wide["spare"] = torch.zeros(2**20)  # more float32, which no module reads
    save_file(wide, folder / "model.safetensors", {"format": "pt"})
    planned = plan(folder, **CODES)
    record = niwaki.compress(folder, tmp_path / "out", device="cpu", **CODES)
    assert planned["output_bytes"] == pytest.approx(record["result"]["bytes"], rel=0.01)
    assert planned["matrix_bits"] == pytest.approx(record["result"]["bits"], rel=0.02)
