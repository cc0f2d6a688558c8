"""Logits in slices: the values of the whole model, within the budget, for heads of every kind."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from niwaki.compression.backward import head_gradient, next_token_losses
from niwaki.data.stream import Stream
from niwaki.errors import InputError
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.decoder import Decoder
from niwaki.model.logits import LOGIT_BYTES, FinalStates, logits_of_part, position_slices, vocabulary_of
from support.families import COMMON, GQA, build, families, sharing_families
from support.models import CPU
from support.odd_families import odd_config

IDS = torch.randint(1, 90, (3, 12), generator=torch.Generator().manual_seed(0))
SMALL = 5 * 4 * 96  # five positions of 96 tokens
HEADS: dict[str, Any] = {  # scales, caps and biases that families() leaves out
    "granite": transformers.GraniteConfig(**GQA, logits_scaling=3.0),
    "cohere": transformers.CohereConfig(**GQA, logit_scale=0.25),
    "gemma2-cap": transformers.Gemma2Config(**GQA, sliding_window=6, final_logit_softcapping=0.5),
    "gemma3-cap": transformers.Gemma3TextConfig(**GQA, sliding_window=6, final_logit_softcapping=0.5),
    "phi": transformers.PhiConfig(**COMMON, intermediate_size=48),
    "gptj": transformers.GPTJConfig(
        vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=64, rotary_dim=4, bos_token_id=0, eos_token_id=0
    ),
    "opt-projected": transformers.OPTConfig(**COMMON, ffn_dim=48, word_embed_proj_dim=16),
}
CONFIGS = {**{name: family.config for name, family in families().items()}, **sharing_families(), **HEADS}
CONFIGS |= {name: odd_config(name) for name in ("ctrl", "xglm", "gpt_neo", "nanochat", "cohere2")}


def opened(model: Any, folder: Path, logit_bytes: int | None, dtype: torch.dtype | None = None) -> Decoder:
    """The decoder of a saved model."""
    if not folder.exists():
        model.save_pretrained(folder)
    return Decoder(Checkpoint.open(folder), CPU, dtype, logit_bytes=logit_bytes)


def final_states(decoder: Decoder) -> Tensor:
    """Hidden states after the last block."""
    stream = Stream(decoder, IDS)
    for index in range(len(decoder)):
        block = decoder.load(index)
        stream.advance(block)
        block.release()
    return stream.hidden.read(slice(0, len(IDS)))


@pytest.mark.parametrize("family", CONFIGS)
def test_slices_are_the_logits_of_the_model(family: str, tmp_path: Path) -> None:
    model = build(CONFIGS[family])
    decoder = opened(model, tmp_path / "model", SMALL)
    with torch.no_grad():
        wanted_NV = model(IDS, use_cache=False).logits.flatten(0, 1)
        states = FinalStates(model)
        sources = [(decoder.logits, final_states(decoder)), (states.logits, states.run(IDS, use_cache=False))]
        parts = decoder.position_slices(IDS.numel())
        assert [part.stop - part.start for part in parts] == [5] * 7 + [1]
        for logits, x_BTD in sources:
            found = [logits_of_part(logits, IDS, x_BTD, part) for part in parts]
            torch.testing.assert_close(torch.cat(found), wanted_NV, rtol=1e-5, atol=1e-5)
            chosen_N = torch.tensor([30, 2, 17])
            one_NV = logits_of_part(logits, IDS, x_BTD, chosen_N)
            torch.testing.assert_close(one_NV, wanted_NV[chosen_N], rtol=1e-5, atol=1e-5)
        assert torch.equal(logits_of_part(states.logits, IDS, sources[1][1], slice(0, 36)), wanted_NV), (
            "whole: bits too"
        )
    after_BTV = model(IDS, use_cache=False).logits
    assert torch.equal(after_BTV.flatten(0, 1), wanted_NV), "the model is as it was"


@pytest.mark.parametrize("family", ["llama-tied", "gemma2-cap", "cohere", "gpt2"])
def test_losses_and_gradients_do_not_depend_on_the_slices(family: str, tmp_path: Path) -> None:
    model = build(CONFIGS[family])
    whole, sliced = (opened(model, tmp_path / "model", limit, torch.float64) for limit in (None, SMALL))
    x_BTD = final_states(whole)
    leaf_BTD = x_BTD.clone().requires_grad_(True)
    logprobs_BTV = whole.logits(IDS, leaf_BTD)[:, :-1].log_softmax(-1)
    wanted_BT = -logprobs_BTV.gather(2, IDS[:, 1:, None])[..., 0]
    (wanted_BTD,) = torch.autograd.grad(wanted_BT.mean(1).sum(), [leaf_BTD])
    for decoder in (whole, sliced):
        loss_B, grad_BTD = head_gradient(decoder, IDS, x_BTD)
        torch.testing.assert_close(loss_B, wanted_BT.detach().mean(1), rtol=1e-12, atol=0)
        torch.testing.assert_close(grad_BTD, wanted_BTD, rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(next_token_losses(decoder, IDS, x_BTD), wanted_BT.detach(), rtol=1e-12, atol=0)
    assert not grad_BTD[:, -1].any(), "the last position predicts nothing"


def test_a_gradient_in_slices_makes_no_larger_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = opened(build(CONFIGS["llama"]), tmp_path / "model", SMALL)
    x_BTD, made, linear = final_states(decoder), [], torch.nn.functional.linear

    def observed(*args: Any) -> Tensor:
        out = linear(*args)
        made.append(out.numel() * 4)
        return out

    monkeypatch.setattr("torch.nn.functional.linear", observed)
    head_gradient(decoder, IDS, x_BTD)
    assert len(made) == 8 and max(made) == SMALL


def test_budgets_are_cut_into_positions() -> None:
    assert position_slices(10, 100, 4 * 400) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    assert position_slices(10, 100, 4 * 1099) == [slice(0, 10)]
    assert position_slices(0, 100) == []
    assert len(position_slices(2048, 262144)) == 2048 * 262144 * 4 // LOGIT_BYTES == 8
    with pytest.raises(InputError, match=r"logit_bytes 399: the logits of one position take 400 bytes .100 tokens"):
        position_slices(10, 100, 399)


def test_the_vocabulary_is_that_of_the_head() -> None:
    model = build(CONFIGS["llama"])
    model.resize_token_embeddings(104)
    model.config.vocab_size = 96
    assert vocabulary_of(model) == 104
