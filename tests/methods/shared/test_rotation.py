"""Learned rotations and orders of columns: the lost share against loops in float64, orthogonality, and gains."""

import itertools

import numpy as np
import pytest
import torch

from niwaki.config.targets import NM, Bits, Sparsity, Target
from niwaki.methods import sparsegpt
from niwaki.methods.shared.rotation import (
    Reads,
    Writes,
    cayley,
    learn_rotation,
    lost_importance,
    lost_share,
    principal_basis,
    random_hadamard,
    regroup,
    search_scales,
)
from support.models import correlated_inputs, run_method


def reference(weight: np.ndarray, h: np.ndarray, target: Target) -> float:
    importance = weight.astype(np.float64) ** 2 * h
    if isinstance(target, NM):
        groups = np.sort(importance.reshape(len(weight), -1, target.group), axis=-1)
        return float(groups[..., : target.group - target.keep].sum())
    if isinstance(target, Sparsity):
        return float(np.sort(importance.ravel())[: round(importance.size * target.zeros_frac)].sum())
    return float(sum(np.abs(row).max() ** 2 * h.sum() for row in weight) / 4**target.bits)


@pytest.mark.parametrize("target", [NM(2, 4), NM(1, 4), Sparsity(0.5), Sparsity(0.7), Bits(3)])
def test_lost_importance_equals_the_reference(target: Target) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, h = torch.randn(6, 16, generator=generator), torch.rand(16, generator=generator)
    found = float(lost_importance(weight, h, target))
    assert found == pytest.approx(reference(weight.numpy(), h.numpy(), target), rel=1e-5)


def _sites(width: int = 16) -> list[Reads | Writes]:
    generator = torch.Generator().manual_seed(0)
    x = correlated_inputs(200, width)
    inner = correlated_inputs(200, 24, seed=1)
    return [
        Reads.of(torch.randn(32, width, generator=generator), x.T @ x / 200, generator),
        Writes.of(torch.randn(width, 24, generator=generator), inner.T @ inner / 200),
    ]


@pytest.mark.parametrize("target", [NM(2, 4), Sparsity(0.5), Bits(3)])
def test_a_learned_rotation_is_orthogonal_and_loses_less(target: Target) -> None:
    sites, start = _sites(), torch.eye(16, dtype=torch.float64)
    before = float(lost_share(sites, start.float(), target))
    turn, lost = learn_rotation(sites, start, target, steps=60, rate=0.02)
    assert float(lost) < 0.9 * before
    assert float(lost_share(sites, turn.float(), target)) == pytest.approx(float(lost), rel=1e-3)
    torch.testing.assert_close(turn @ turn.T, start, rtol=0, atol=1e-12)
    kept, same = learn_rotation(sites, turn, target, steps=0, rate=0.02)
    assert torch.equal(kept, turn) and float(same) == pytest.approx(float(lost), rel=1e-3)


def test_a_sweep_loses_less_in_the_learned_basis() -> None:
    """Prune 2:4 with SparseGPT: the error of the output falls, because importance gathers in fewer weights."""
    generator = torch.Generator().manual_seed(0)
    x, weight = correlated_inputs(400, 32), torch.randn(48, 32, generator=generator)
    gram = x.T @ x / 400
    reads, target = Reads.of(weight, gram, generator), NM(2, 4)
    turn, _ = learn_rotation([reads], principal_basis(gram, 4), target, steps=80, rate=0.02)

    def lost(weight_OI: torch.Tensor, x_NI: torch.Tensor) -> float:
        pruned = run_method(sparsegpt, weight_OI, x_NI, target)
        assert int((pruned == 0).sum()) >= pruned.numel() // 2
        return float(((pruned - weight_OI) @ x_NI.T).square().sum())

    assert lost(weight @ turn.float(), x @ turn.float()) < 0.75 * lost(weight, x)


def test_a_start_that_no_step_improves_is_kept() -> None:
    sites, start = _sites(), torch.eye(16, dtype=torch.float64)
    best, lost = learn_rotation(sites, start, NM(2, 4), steps=200, rate=0.02)
    again, same = learn_rotation(sites, best, NM(2, 4), steps=1, rate=0.9)
    assert torch.equal(again, best) and float(same) == pytest.approx(float(lost), rel=1e-3)


@pytest.mark.parametrize("width", [1, 6, 8, 12, 64])
def test_hadamard_is_orthogonal_and_spreads(width: int) -> None:
    matrix = random_hadamard(width, torch.Generator().manual_seed(0))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-12)
    if width in (8, 64):
        torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, width**-0.5))


def test_cayley_of_a_batch_is_orthogonal() -> None:
    turned = cayley(torch.randn(3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(turned @ turned.mT, torch.eye(5, dtype=torch.float64).expand(3, 5, 5))
    assert torch.equal(cayley(torch.zeros(4, 4)), torch.eye(4))


def test_neighbors_in_the_principal_basis_have_unlike_energy() -> None:
    x = correlated_inputs(400, 16).double()
    gram = x.T @ x
    energy = ((gram @ (basis := principal_basis(gram, 4))) * basis).sum(0)
    falling = energy.sort(descending=True).values
    torch.testing.assert_close(energy.view(4, 4), falling.view(4, 4).T)


def test_regroup_finds_the_best_groups_of_a_small_matrix() -> None:
    importance = torch.rand(8, 8, generator=torch.Generator().manual_seed(3)) ** 4

    def kept(order: torch.Tensor) -> float:
        return float(importance[:, order].view(8, 2, 4).topk(2, dim=-1).values.sum())

    splits = [torch.tensor([*half, *(i for i in range(8) if i not in half)])
              for half in itertools.combinations(range(8), 4)]  # fmt: skip
    order = regroup(importance, NM(2, 4), torch.Generator().manual_seed(0), 50)
    assert order.sort().values.tolist() == list(range(8))
    assert kept(order) >= 0.995 * max(map(kept, splits)) and kept(order) > kept(torch.arange(8))


@pytest.mark.parametrize("target", [NM(2, 4), NM(1, 4), NM(4, 8)])
def test_every_round_of_regroup_keeps_more(target: NM) -> None:
    importance = torch.rand(32, 48, generator=torch.Generator().manual_seed(0)) ** 3

    def kept(order: torch.Tensor) -> float:
        groups = importance[:, order].unflatten(1, (-1, target.group))
        return float(groups.topk(target.keep, dim=-1).values.sum())

    found = [kept(regroup(importance, target, torch.Generator().manual_seed(0), rounds)) for rounds in (0, 1, 5, 40)]
    assert found == sorted(found) and found[-1] > found[0]


def test_rotations_of_a_batch_are_those_of_each_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    grams = torch.stack([(x := correlated_inputs(100, 8, seed=seed)).T @ x for seed in range(3)])
    weights, starts = torch.randn(3, 12, 8, generator=generator), principal_basis(grams, 4)
    together, lost = learn_rotation([Reads.of(weights, grams, generator)], starts, NM(2, 4), steps=20, rate=0.02)
    for number in range(3):
        sites = [Reads.of(weights[number], grams[number], generator)]
        alone, own = learn_rotation(sites, starts[number], NM(2, 4), steps=20, rate=0.02)
        torch.testing.assert_close(together[number], alone, rtol=1e-3, atol=1e-3)
        assert float(lost[number]) == pytest.approx(float(own), rel=1e-3)


def test_scales_lose_least_of_all_powers() -> None:
    """Give one channel large inputs: its weights must lose less than without scales, as a loop in float64 finds."""
    generator = torch.Generator().manual_seed(0)
    weight, h = torch.randn(24, 32, generator=generator), torch.rand(32, generator=generator) + 0.1
    h[5] = 400.0
    scales, before, after = search_scales(weight, h, bits=3, group=16)

    def lost(s: np.ndarray) -> float:
        scaled, total = weight.double().numpy() * s, 0.0
        for start in (0, 16):
            part = scaled[:, start : start + 16]
            low, high = np.minimum(part.min(1), 0)[:, None], np.maximum(part.max(1), 0)[:, None]
            step = (high - low) / 7
            code = np.clip(np.round(part / step) + np.round(-low / step), 0, 7)
            back = (code - np.round(-low / step)) * step / s[start : start + 16]
            missed = back - weight.double().numpy()[:, start : start + 16]
            total += float((missed**2 * h.double().numpy()[start : start + 16]).sum())
        return total / float((weight.double().square() * h).sum())

    found = [lost(np.sqrt(h.double().numpy()) ** (power / 20)) for power in range(21)]
    assert after < 0.7 * before
    assert before == pytest.approx(found[0], rel=0.02) and after == pytest.approx(min(found), rel=0.02)
    assert lost(scales.double().numpy()) == pytest.approx(after, rel=0.02)
