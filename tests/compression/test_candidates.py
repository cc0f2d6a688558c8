"""Losses of masks with one block in memory, against masks on the activations of the whole model."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from niwaki.compression.contextual import losses_after_prompt
from niwaki.data.stream import Stream
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.decoder import Decoder
from niwaki.runtime.contextual.selection import Rule, Variant
from support.contextual import ids_of, layout_of, masked_logits, model_of

TOKENS = 16


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_losses_are_those_of_the_masked_model(family: str, tmp_path: Path) -> None:
    model = model_of(family)
    model.save_pretrained(tmp_path)
    layout, ids_ST, lengths_S = layout_of(model), ids_of(5, TOKENS), torch.tensor([4, 8, 4, 8, 4])
    generator = torch.Generator().manual_seed(0)
    variants = [
        Variant(Rule(skip_frac).select(torch.rand(5, layout.size, generator=generator), layout), mean_fill)
        for skip_frac, mean_fill in ((0.5, 0.0), (0.7, 0.5), (0.0, 0.5))
    ]
    decoder = Decoder(Checkpoint.open(tmp_path), torch.device("cpu"))
    found = losses_after_prompt(
        decoder, ids_ST, lengths_S, layout, variants, lambda ids, name: Stream(decoder, ids, batch_tokens=2 * TOKENS)
    )
    for loss, variant in zip(found, variants, strict=True):
        tokens = []
        for row, length in enumerate(lengths_S.tolist()):
            ids_1T, kept_1U = ids_ST[row : row + 1], variant.kept_BU[row : row + 1]
            logits_TV = masked_logits(model, ids_1T, length, kept_1U, layout, variant.mean_fill)[0]
            tokens.append(cross_entropy(logits_TV[length:-1], ids_1T[0, length + 1 :], reduction="none"))
        assert loss == pytest.approx(float(torch.cat(tokens).mean()), rel=1e-5)
    dense = losses_after_prompt(
        decoder, ids_ST, lengths_S, layout, variants[2:], lambda ids, name: Stream(decoder, ids)
    )
    assert dense[0] == pytest.approx(found[2], rel=1e-5) and abs(found[0] - found[2]) > 1e-4
