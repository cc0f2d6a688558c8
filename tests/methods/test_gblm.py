"""Gradient-blended Wanda against its formula, with gradients from autograd through the whole model."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import niwaki
from niwaki.config.targets import Sparsity
from niwaki.data.documents import read_texts
from niwaki.data.texts import calibration_windows, load_tokenizer
from niwaki.errors import InputError
from niwaki.methods import gblm, wanda
from support.models import calibration_of, correlated_inputs, make_block, tiny_llama, weights_of, write_texts

MATRICES = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.mark.parametrize("alpha", [0.0, 1.0, 100.0])
def test_a_compression_equals_the_formula_in_its_first_block(alpha: float, tmp_path: Path) -> None:
    folder, text = tiny_llama(tmp_path / "model"), write_texts(tmp_path / "text.jsonl")
    calibration = {"files": (str(text),), "samples": 5, "seq_len": 12}
    niwaki.compress(
        folder, tmp_path / "out", method="gblm", target="0.5", calibration=calibration, device="cpu",
        options={"alpha": alpha},
    )  # fmt: skip
    windows = calibration_windows(read_texts([str(text)]), load_tokenizer(folder), samples=5, seq_len=12, seed=0)
    model = AutoModelForCausalLM.from_pretrained(folder).double()
    parts = {name: model.get_submodule(f"model.layers.0.{name}") for name in MATRICES}
    norms, squares = {}, {name: torch.zeros_like(part.weight) for name, part in parts.items()}
    for window in windows:
        inputs: dict[str, torch.Tensor] = {}
        hooks = [
            part.register_forward_pre_hook(
                lambda _, args, name=name, inputs=inputs: inputs.update({name: args[0].detach()})
            )
            for name, part in parts.items()
        ]
        loss = model(window[None], labels=window[None], use_cache=False).loss
        grads = torch.autograd.grad(loss, [part.weight for part in parts.values()])
        for (name, grad), hook in zip(zip(parts, grads, strict=True), hooks, strict=True):
            squares[name] += grad.square()
            norms[name] = norms.get(name, 0) + inputs[name].square().sum((0, 1)) / len(windows)
            hook.remove()
    found = weights_of(tmp_path / "out")
    for name, part in parts.items():
        scores = part.weight.detach().abs() * (alpha * squares[name].sqrt() + norms[name].sqrt())
        wanted = scores > scores.kthvalue(scores.shape[1] // 2, dim=1, keepdim=True).values
        assert torch.equal(found[f"model.layers.0.{name}.weight"] != 0, wanted), name


def test_without_gradients_it_is_wanda() -> None:
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    block = make_block({"m": weight})
    calib = calibration_of(block, correlated_inputs(40, 16), gblm.needs(gblm.Config()))
    generator, targets = torch.Generator(), {"m": Sparsity(0.5)}
    found = gblm.compress(block, calib, targets, gblm.Config(alpha=0.0), generator)["m"]
    plain = wanda.compress(block, calib, targets, wanda.Config(), generator)["m"]
    assert torch.equal(found.weight_OI, plain.weight_OI)


def test_gradients_decide_where_norms_do_not() -> None:
    block = make_block({"m": torch.ones(1, 4)})
    calib = calibration_of(block, torch.ones(8, 4), gblm.needs(gblm.Config()))
    calib.gradients["m"][:] = torch.tensor([[1.0, 4.0, 2.0, 3.0]])  # type: ignore[index]
    found = gblm.compress(block, calib, {"m": Sparsity(0.5)}, gblm.Config(), torch.Generator())["m"]
    assert found.weight_OI.tolist() == [[0.0, 1.0, 0.0, 1.0]]


def test_impossible_alpha() -> None:
    with pytest.raises(InputError, match="alpha must be 0 or more, got -1"):
        niwaki.compress("m", "o", method="gblm", target="0.5", options={"alpha": -1})
