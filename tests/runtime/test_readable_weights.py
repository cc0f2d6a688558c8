"""Models whose code reads the weight of a layer that is stored packed: in a forward, or while they load."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import niwaki
from niwaki.runtime.linear import PackedLinear
from niwaki.runtime.sparse_linear import SparseLinear
from support.families import build
from support.models import add_tokenizer, write_texts
from support.odd_models import OddConfig

SIZES: dict[str, Any] = {"vocab_size": 4096, "bos_token_id": 0, "eos_token_id": 0}
CONFIGS = {
    "gpt_bigcode": transformers.GPTBigCodeConfig(**SIZES, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "nanochat": transformers.NanoChatConfig(
        **SIZES, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=64, pad_token_id=0,
    ),
    "reads": OddConfig("reads", num_hidden_layers=2, **SIZES),
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "gptq": {"target": "4bit", "options": {"group": 0}},
    "wanda": {"target": "2:4"},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", CONFIGS)
def test_a_packed_layer_gives_the_weight_that_code_reads(family: str, method: str, tmp_path: Path) -> None:
    build(CONFIGS[family]).save_pretrained(tmp_path / "model")
    add_tokenizer(tmp_path / "model")
    text, ids = write_texts(tmp_path / "text.jsonl"), torch.arange(1, 25).view(2, 12)
    logits = []
    for pack in ("auto", "none"):
        out = tmp_path / pack
        niwaki.compress(
            tmp_path / "model", out, method=method, pack=pack, device="cpu",
            calibration={"files": (str(text),), "samples": 2, "seq_len": 16}, **METHODS[method],
        )  # fmt: skip
        model: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
        with torch.no_grad():
            logits.append(model(input_ids=ids, use_cache=False).logits)
        packed = [module for module in model.modules() if isinstance(module, PackedLinear | SparseLinear)]
        assert bool(packed) == (pack == "auto")
        for module in packed:
            assert torch.equal(module.weight, module.weight_OI(torch.float32))
            assert module.bfloat16().weight.dtype == torch.bfloat16
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-3, atol=1e-3)
