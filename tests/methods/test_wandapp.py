"""Wanda++: the score against float64 finite differences and loops, and what regional optimisation must keep."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

import niwaki
from niwaki.config.targets import NM, Sparsity, Target
from niwaki.data.stream import CalibrationData, Stream
from niwaki.errors import InputError
from niwaki.methods import wandapp
from niwaki.methods.registry import get_method
from niwaki.methods.shared.block_training import Reconstruction, Schedule, assemble, train_block
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.decoder import Decoder
from support.blocks import calibration_with_gradients, first_block
from support.families import build
from support.models import CPU, calibration_of, correlated_inputs, make_block, run_method, tiny_llama, write_texts

SCORE_ONLY = {"rounds": 0}


def reference(weight: np.ndarray, x_STI: np.ndarray, target: Target, alpha: float, mean: str = "rms") -> np.ndarray:
    """Prune in float64, row by row: f(X) = XWᵀ, so ∂‖f(X_n)‖/∂W = (X_nWᵀ)ᵀX_n / ‖X_nWᵀ‖."""
    w, x = weight.astype(np.float64), x_STI.astype(np.float64)
    slopes = []
    for window in x:
        out = window @ w.T
        slopes.append(out.T @ window / np.linalg.norm(out))
    gradient = np.abs(slopes).mean(0) if mean == "mean" else np.sqrt(np.square(slopes).mean(0))
    norm = np.sqrt((x**2).sum(axis=(0, 1)) / len(x))
    scores = (alpha * gradient + norm) * np.abs(w)
    result = w.copy()
    for row in range(len(w)):
        if isinstance(target, NM):
            for start in range(0, w.shape[1], target.group):
                lowest = np.argsort(scores[row, start : start + target.group])[: target.group - target.keep]
                result[row, start + lowest] = 0
        else:
            result[row, np.argsort(scores[row])[: round(w.shape[1] * target.zeros_frac)]] = 0
    return result


@pytest.mark.parametrize("target", [Sparsity(0.5), Sparsity(0.75), NM(2, 4), NM(1, 4)])
@pytest.mark.parametrize(
    ("alpha", "mean"), [(0.0, "rms"), (1.0, "rms"), (100.0, "rms"), (1.0, "mean"), (100.0, "mean")]
)
def test_the_score_equals_the_reference(target: Target, alpha: float, mean: str) -> None:
    weight = torch.randn(10, 16, generator=torch.Generator().manual_seed(0))
    x = correlated_inputs(40, 16)
    found = run_method(wandapp, weight, x, target, alpha=alpha, gradient=mean, **SCORE_ONLY)
    wanted = reference(weight.numpy(), x.reshape(8, 5, 16).numpy(), target, alpha, mean)
    np.testing.assert_array_equal(found.numpy(), wanted.astype(np.float32))


def test_the_two_means_of_the_gradients_choose_different_weights() -> None:
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    x = correlated_inputs(40, 64) * torch.logspace(-1, 1, 40)[:, None]  # windows of very different sizes
    rms, mean = (
        run_method(wandapp, weight, x, Sparsity(0.5), alpha=1e4, gradient=g, **SCORE_ONLY) for g in ("rms", "mean")
    )
    assert not torch.equal(rms, mean)
    with pytest.raises(ValueError, match="gradient must be one of rms, mean, got 'median'"):
        wandapp.Config(gradient="median")


def test_regional_gradients_equal_finite_differences_of_the_whole_block(tmp_path: Path) -> None:
    """Compare ∂‖f(X)‖/∂W of attention and MLP weights, residual included, in float64."""
    block, stream = first_block(tmp_path, windows=2)
    calib = calibration_with_gradients(block, stream)
    names = {name: block.weight(name) for name in block.linears}
    found = wandapp.regional_gradients(block, calib, names)
    block.module.double()
    call = stream.call([0], 0)
    kwargs = {k: tuple(t.double() for t in v) if isinstance(v, tuple) else v for k, v in call.kwargs.items()}

    def norm(window: int) -> float:
        out = block.module(stream.hidden.take([window]).double(), *call.args, **kwargs)
        return float((out[0] if isinstance(out, tuple) else out).norm())

    step = 5e-3  # the norms inside the block stay float32
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"):
        weight = block.weight(name)
        for row, column in ((0, 0), (3, 7), (11, 30)):
            slopes = []
            for window in range(2):
                before = weight[row, column].item()
                weight[row, column] = before + step
                up = norm(window)
                weight[row, column] = before - step
                slopes.append((up - norm(window)) / (2 * step))
                weight[row, column] = before
            wanted = float(np.sqrt(np.mean(np.square(slopes))))
            assert found[name][row, column].item() == pytest.approx(wanted, rel=1e-2, abs=1e-4)


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
@pytest.mark.parametrize("target", [Sparsity(0.5), NM(2, 4)])
def test_learning_lowers_the_heldout_error_and_keeps_the_mask(tmp_path: Path, optimizer: str, target: Target) -> None:
    block, stream = first_block(tmp_path, windows=33)
    calib = calibration_with_gradients(block, stream)
    targets = dict.fromkeys(block.linears, target)
    before = {name: block.weight(name).clone() for name in block.linears}
    rate_frac = 0.03 if optimizer == "adam" else 0.01
    config = wandapp.Config(optimizer=optimizer, rounds=4, samples=24, rate_frac=rate_frac)
    pruned = wandapp.compress(block, calib, targets, wandapp.Config(rounds=0), torch.Generator())
    learned = wandapp.compress(block, calib, targets, config, torch.Generator())
    for name, record in learned.items():
        assert torch.equal(record.weight_OI == 0, pruned[name].weight_OI == 0)
        assert record.detail["heldout_error"] < 0.9 * record.detail["heldout_error_start"]
        assert torch.equal(block.weight(name), before[name])


def test_a_start_that_learning_cannot_improve_is_kept_and_noted(tmp_path: Path) -> None:
    """Take steps that are far too long: every round ends worse than it began."""
    block, stream = first_block(tmp_path)
    calib = calibration_with_gradients(block, stream)
    targets = dict.fromkeys(block.linears, Sparsity(0.5))
    config = wandapp.Config(rate_frac=0.99, optimizer="rmsprop", rounds=1, samples=2, batch=2)
    pruned = wandapp.compress(block, calib, targets, wandapp.Config(rounds=0), torch.Generator())
    learned = wandapp.compress(block, calib, targets, config, torch.Generator())
    for name, record in learned.items():
        assert record.detail["heldout_error"] == record.detail["heldout_error_start"]
        assert torch.equal(record.weight_OI, pruned[name].weight_OI)
        assert wandapp.KEPT_START in record.note


def test_without_enforcement_weights_regrow_and_the_budget_still_holds(tmp_path: Path) -> None:
    block, stream = first_block(tmp_path, windows=33)
    calib = calibration_with_gradients(block, stream)
    targets = dict.fromkeys(block.linears, Sparsity(0.5))
    free = wandapp.Config(enforce_mask=False, rounds=4, samples=24, rate_frac=0.1)
    learned = wandapp.compress(block, calib, targets, free, torch.Generator())
    pruned = wandapp.compress(block, calib, targets, wandapp.Config(rounds=0), torch.Generator())
    moved = 0
    for name, record in learned.items():
        assert int((record.weight_OI == 0).sum()) == targets[name].zeros_in(*record.weight_OI.shape)
        moved += int(((record.weight_OI == 0) != (pruned[name].weight_OI == 0)).sum())
    assert moved > 0


def test_heldout_windows_are_never_learned_from(tmp_path: Path) -> None:
    block, stream = first_block(tmp_path, windows=17)
    task = Reconstruction(block, calibration_with_gradients(block, stream), "block", torch.Generator().manual_seed(0))
    assert len(task.held) == 2 and not set(task.held) & set(task.train)
    drawn = task.draw(40, torch.Generator())
    assert set(drawn) == set(task.train)
    assert sorted(drawn[:15]) == sorted(task.train)  # each once before any comes again


def test_the_gradient_of_a_step_is_that_of_the_error(tmp_path: Path) -> None:
    """Compare with autograd through a block whose own parameters require gradients."""
    block, stream = first_block(tmp_path)
    task = Reconstruction(block, calibration_with_gradients(block, stream), "block", torch.Generator())
    half = {name: block.weight(name) * 0.5 for name in block.linears}
    found = task.gradients(half, [3])
    for name, weight in half.items():
        block.assign(name, weight)
    block.module.requires_grad_(True)
    y = stream.call([3], 0)(block.module, stream.hidden.take([3]))
    t = task.outputs.take([3])
    ((y - t).square().sum(-1) / t.square().sum(-1)).sum().backward()
    for name, linear in block.linears.items():
        wanted = block.module.get_parameter(linear.parameter).grad
        assert wanted is not None
        torch.testing.assert_close(found[name], linear.view(wanted), rtol=1e-4, atol=1e-7)


def test_transposed_and_fused_weights_learn_too(tmp_path: Path) -> None:
    """Lower the error in other layouts: GPT-2 stores [I, O], Mixtral stacks its experts."""
    from support.families import families

    for family in ("gpt2", "mixtral"):
        config = families()[family].config
        build(config).save_pretrained(tmp_path / family)
        decoder = Decoder(Checkpoint.open(tmp_path / family), CPU)
        stream = Stream(decoder, torch.randint(0, 96, (9, 16)), learn_batches=frozenset({1, 2}))
        block = decoder.load(0)
        calib = calibration_with_gradients(block, stream)
        targets = dict.fromkeys(block.linears, Sparsity(0.5))
        config_ = wandapp.Config(rounds=2, samples=8)
        for record in wandapp.compress(block, calib, targets, config_, torch.Generator()).values():
            assert record.detail["heldout_error"] < record.detail["heldout_error_start"]


def test_dense_target_pulls_to_the_dense_stream(tmp_path: Path) -> None:
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    block = make_block({"m": weight})
    x = correlated_inputs(64, 8)
    calib = calibration_of(block, x, wandapp.needs(wandapp.Config()))
    other = calibration_of(make_block({"m": weight}), x, wandapp.needs(wandapp.Config()))
    assert calib.stream is not None and other.dense is not None
    wanted = torch.randn(8, 8, 6, generator=torch.Generator().manual_seed(1))
    other.dense.hidden.store_STD = wanted
    for target, goal in (("dense", wanted), ("both", (wanted + calib.stream.outputs.store_STD) / 2)):  # type: ignore[union-attr]
        task = Reconstruction(
            block, CalibrationData(calib.statistics, calib.stream, other.dense), target, torch.Generator()
        )
        y = x.reshape(8, 8, 8)[task.held] @ weight.T
        t = goal[task.held]
        error = ((y - t).square().sum(-1) / t.square().sum(-1)).mean()
        assert task.error({"m": weight}) == pytest.approx(error.item(), rel=1e-5)


def test_descend_reaches_a_reachable_optimum() -> None:
    """Learn from a teacher with the same mask: the error falls to nearly zero."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(6, 16, generator=generator)
    keep = torch.rand(6, 16, generator=generator) > 0.5
    block = make_block({"m": weight * keep})
    calib = calibration_of(block, correlated_inputs(256, 16), wandapp.needs(wandapp.Config()))
    task = Reconstruction(block, calib, "block", generator)
    start: dict[str, Tensor] = {"m": weight * keep + 0.3 * torch.randn(6, 16, generator=generator)}
    schedule = Schedule(rounds=40, samples=7, batch=1, rate_frac=0.03, optimizer="adam")
    found, errors = train_block(task, start, {"m": keep}, schedule, generator)
    assert errors.error < 0.01 * errors.start_error
    assert (found["m"][~keep] == 0).all()


def test_in_a_chain_the_mask_of_the_step_before_stays(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    text = write_texts(tmp_path / "text.jsonl")
    common = {"target": "2:4", "calibration": {"files": (str(text),), "samples": 12, "seq_len": 16}, "device": "cpu"}
    niwaki.compress(model, tmp_path / "first", method="sparsegpt", **common)
    options = {"wandapp.rounds": 1, "wandapp.samples": 4, "sparsegpt.damping_frac": 0.01}
    niwaki.compress(model, tmp_path / "chain", method="sparsegpt+wandapp", options=options, **common)
    first = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "first").model.layers[0]
    chain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "chain").model.layers[0]
    for name, parameter in first.named_parameters():
        if "proj" in name:
            other = chain.get_parameter(name)
            assert torch.equal(parameter == 0, other == 0)
            assert not torch.equal(parameter, other)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("wandapp+wanda", {}, "wanda cannot take up"),
        ("sparsegpt+wandapp", {"rounds": 1}, "write it as method.option"),
        ("wandapp+wandapp", {}, "may appear only once in a chain"),
        ("wandapp", {"optimizer": "sgd"}, "optimizer must be one of"),
        ("wandapp", {"target": "both_"}, "target must be one of"),
        ("wandap", {}, "did you mean 'wandapp'"),
        ("besa", {}, "besa meets a share of zeros"),
    ],
)
def test_wrong_chains_and_options_are_one_line(
    tmp_path: Path, method: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        niwaki.compress(tiny_llama(tmp_path / "m"), tmp_path / "out", method=method, target="2:4", options=options)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_every_method_says_what_it_is() -> None:
    assert get_method("wandapp").paper.startswith("Yang")


def test_matrices_in_the_block_s_own_dtype_are_learned_from_without_a_copy(tmp_path: Path) -> None:
    block, stream = first_block(tmp_path)
    own = {name: block.weight(name) for name in block.linears}
    shared = assemble(block, own)
    converted = assemble(block, {name: weight.double() for name, weight in own.items()})
    for name, weight in own.items():
        parameter = block.linears[name].parameter
        assert shared[parameter].data_ptr() == weight.data_ptr()
        assert converted[parameter].data_ptr() != weight.data_ptr() and torch.equal(converted[parameter], weight)
    before = {name: weight.clone() for name, weight in own.items()}
    task = Reconstruction(block, calibration_with_gradients(block, stream), "block", torch.Generator().manual_seed(0))
    task.gradients({name: weight * 0.9 for name, weight in own.items()}, [0])
    task.gradients(own, [1])
    assert not any(weight.requires_grad for weight in own.values())
    assert all(torch.equal(weight, before[name]) for name, weight in own.items())
