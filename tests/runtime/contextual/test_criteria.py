"""Criteria against loops in float64 over autograd through the whole model, and traces that see no future."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from niwaki.compression.traces import trace
from niwaki.data.stream import Stream
from niwaki.model.anatomy import find_blocks
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.decoder import Decoder
from niwaki.runtime.contextual.criteria import CRITERIA
from niwaki.runtime.contextual.traces import Traces, nbytes, prompt_lengths
from niwaki.runtime.contextual.units import KINDS, UnitLayout
from support.contextual import ids_of, layout_of, model_of

TOKENS, CUTS = 16, 2


def whole_graph(model: Any, layout: UnitLayout, ids_T: Tensor) -> dict[tuple[int, str], tuple[Tensor, Tensor]]:
    """Outputs of all units [T, C] and their gradients, by block and kind, for one window."""
    met: dict[tuple[int, str], Tensor] = {}
    handles = [
        block.get_submodule(layout.units[kind].consumer).register_forward_pre_hook(
            lambda _, args, key=(index, kind): met.update({key: args[0].requires_grad_()})
        )
        for index, block in enumerate(find_blocks(model)[1])
        for kind in KINDS
    ]
    logits = model(ids_T[None], use_cache=False).logits[0, :-1].log_softmax(-1)
    loss = -logits.gather(1, ids_T[1:, None]).mean()
    grads = torch.autograd.grad(loss, list(met.values()))
    for handle in handles:
        handle.remove()
    size = len(ids_T)
    return {
        key: (x.detach().reshape(size, -1), grad.reshape(size, -1))
        for (key, x), grad in zip(met.items(), grads, strict=True)
    }


def by_loop(criterion: str, kind: str, x_TC: Tensor, g_TC: Tensor, channels: range) -> float:
    """The formulas as they are written, one channel and token at a time."""
    tokens = range(len(x_TC))
    if criterion == "plainact" and kind == "heads":
        return sum(abs(sum(float(x_TC[t, c] * g_TC[t, c]) for c in channels)) for t in tokens)
    term = {
        "energy": lambda x, g: x**2 / len(x_TC) / len(channels),
        "l2": lambda x, g: x**2,
        "plainact": lambda x, g: abs(x * g),
        "fisher": lambda x, g: (x * g) ** 2 / len(x_TC),
        "grad_norm": lambda x, g: g**2,
        "snip": lambda x, g: abs(g),
    }[criterion]
    total = sum(float(term(x_TC[t, c], g_TC[t, c])) for c in channels for t in tokens)
    return total if criterion in ("plainact", "snip") else total**0.5


def traced(folder: Path, ids_ST: Tensor, width: int = 1, criteria: tuple[str, ...] = CRITERIA) -> dict[str, Traces]:
    decoder = Decoder(Checkpoint.open(folder), torch.device("cpu"))
    model = decoder.model
    layout = layout_of(model, width)
    return trace(
        decoder, ids_ST, layout, criteria, cuts=CUTS, gradient_windows=3,
        make_stream=lambda ids, name: Stream(decoder, ids, batch_tokens=2 * TOKENS),
    )  # fmt: skip


@pytest.mark.parametrize(("family", "width"), [("llama", 1), ("llama", 16), ("opt", 1)])
def test_scores_are_the_formulas_on_the_continuation(family: str, width: int, tmp_path: Path) -> None:
    model = model_of(family)
    model.save_pretrained(tmp_path)
    layout, ids_ST = layout_of(model, width), ids_of(3, TOKENS)
    found = traced(tmp_path, ids_ST, width)
    whole = [whole_graph(model.double(), layout, ids_T) for ids_T in ids_ST]
    for sample, (window, length) in enumerate((w, p) for w in range(3) for p in prompt_lengths(TOKENS, CUTS)):
        for criterion in CRITERIA:
            parts = layout.split(found[criterion].score_NU[sample : sample + 1].double())
            for kind, part_1LG in zip(KINDS, parts, strict=True):
                for block, unit in ((0, 0), (2, layout.count(kind) - 1)):
                    x_TC, g_TC = (part[length:] for part in whole[window][block, kind])
                    size = x_TC.shape[1] // layout.count(kind)
                    channels = range(unit * size, (unit + 1) * size)
                    wanted = by_loop(criterion, kind, x_TC, g_TC, channels)
                    assert float(part_1LG[0, block, unit]) == pytest.approx(wanted, rel=5e-3, abs=1e-9), criterion


def test_sensitivity_and_prompt_statistics(tmp_path: Path) -> None:
    model = model_of("llama")
    model.save_pretrained(tmp_path)
    layout, ids_ST = layout_of(model), ids_of(3, TOKENS)
    found = traced(tmp_path, ids_ST, criteria=("energy",))["energy"]
    whole = [whole_graph(model.double(), layout, ids_T) for ids_T in ids_ST]
    sensitivity = layout.split(found.sensitivity_U[None].double())[1][0]
    wanted = torch.stack([whole[w][1, "neurons"][1].square().mean(0) for w in range(3)]).mean(0).sqrt()
    torch.testing.assert_close(sensitivity[1], wanted, rtol=1e-4, atol=1e-9)
    length = prompt_lengths(TOKENS, CUTS)[0]
    x_TC = whole[0][0, "heads"][0]
    torch.testing.assert_close(found.last_ND[0].double(), x_TC[length - 1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.mean_ND[0].double(), x_TC[:length].mean(0), rtol=1e-4, atol=1e-6)
    prompt = layout.split(found.prompt_NU[:1].double())[1][0, 2]
    torch.testing.assert_close(prompt, whole[0][2, "neurons"][0][:length].square().mean(0).sqrt(), rtol=5e-3, atol=1e-6)


def test_what_a_predictor_sees_does_not_depend_on_the_continuation(tmp_path: Path) -> None:
    model = model_of("llama")
    model.save_pretrained(tmp_path)
    ids_ST, others_ST = ids_of(3, TOKENS), ids_of(3, TOKENS, seed=1)
    length = prompt_lengths(TOKENS, CUTS)[-1]
    others_ST[:, :length] = ids_ST[:, :length]
    left, right = (traced(tmp_path, ids, criteria=("energy",))["energy"] for ids in (ids_ST, others_ST))
    for name in ("last_ND", "mean_ND", "prompt_NU"):
        torch.testing.assert_close(getattr(left, name), getattr(right, name))
    assert not torch.equal(left.score_NU, right.score_NU)


def test_the_size_of_traces_is_known_beforehand(tmp_path: Path) -> None:
    model = model_of("llama")
    model.save_pretrained(tmp_path)
    found = traced(tmp_path, ids_of(3, TOKENS), criteria=("energy",))["energy"]
    held = (found.last_ND, found.mean_ND, found.prompt_NU, found.score_NU)
    wanted = nbytes(len(found), layout_of(model), found.last_ND.shape[1])
    assert wanted == sum(part.nbytes for part in held)
