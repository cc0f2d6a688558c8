"""Squeeze10: true bits within the target, salient columns by each choice, learning that never hurts."""

from pathlib import Path

import numpy as np
import pytest
import torch

import niwaki
from niwaki.compression.walk import collect
from niwaki.config.targets import Bits, parse_target
from niwaki.data.statistics import Needs, Statistics
from niwaki.data.stream import CalibrationData
from niwaki.errors import TargetError
from niwaki.formats.packed import Packed
from niwaki.methods import squeeze10
from niwaki.methods.shared.learned_rounding import Latent
from niwaki.methods.shared.rounding import damped, groups_of, nearest
from niwaki.methods.squeeze10 import Config, RoundingProblem, Split, split_columns
from support.blocks import first_block, quadratic_error
from support.models import calibration_of, correlated_inputs, make_block, run_method, tiny_llama, write_texts


def squeeze(weight: torch.Tensor, x: torch.Tensor, bits: float, **options) -> Packed:
    config = Config(learn_rounds=0, **options)
    calib = calibration_of(make_block({"m": weight}), x, squeeze10.needs(config))
    targets = {"m": Bits(bits)}
    return squeeze10.compress(make_block({"m": weight}), calib, targets, config, torch.Generator())["m"]


def wide() -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights, and inputs of which some matter much more, as in a language model."""
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(0))
    x = correlated_inputs(600, 256)
    x[:, torch.randperm(256, generator=torch.Generator().manual_seed(1))[:20]] *= 8
    return weight, x


def output_error(found: torch.Tensor, weight: torch.Tensor, x: torch.Tensor) -> float:
    return float((x @ (found - weight).T).square().sum() / (x @ weight.T).square().sum())


@pytest.mark.parametrize("bits", [1.3, 1.6, 1.75, 2.5, 4.0])
@pytest.mark.parametrize(
    "options",
    [{}, {"widths": "1+4"}, {"group": 64, "salient_group": 32}, {"mean": False}, {"salient_first": False}],
)
def test_everything_stored_fits_the_target_and_uses_it(bits: float, options: dict) -> None:
    weight, x = wide()
    if bits == 1.3 and options.get("group"):
        bits = 1.55
    options = {"group": 0, "salient_group": 0} | options
    packed = squeeze(weight, x, bits, rounds=1, **options)
    found = 8 * packed.nbytes(torch.bfloat16) / weight.numel()
    # One step is eight columns of three bits more.
    assert bits - (8 * 3 + 16) / 256 < found <= bits
    assert torch.equal(packed.decode(torch.float32), packed.weight_OI)


def test_a_target_below_the_format_names_the_least_it_can_reach(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"a 96×256 matrix needs at least 1\.125 bits"):
        split_columns(96, 256, parse_target("1.1bit"), Config())
    assert split_columns(96, 256, parse_target("1.125bit"), Config()) == Split(1, 2, 0)
    model = tiny_llama(tmp_path / "model", blocks=1)
    text = write_texts(tmp_path / "text.jsonl")
    calibration = {"files": (str(text),), "samples": 2, "seq_len": 8}
    with pytest.raises(TargetError, match="needs at least"):
        niwaki.compress(
            model, tmp_path / "out", method="squeeze10", target="1bit", device="cpu", calibration=calibration
        )
    assert not list(tmp_path.glob("out*"))


def test_choices_by_activation_robustness_and_surgeon_beat_random_and_magnitude() -> None:
    weight, x = wide()
    errors = {
        choose: output_error(squeeze(weight, x, 1.6, choose=choose, rounds=0, widths="1+4").weight_OI, weight, x)
        for choose in squeeze10.CHOICES
    }
    for choice in ("robustness", "surgeon", "activation"):
        assert errors[choice] < 0.8 * min(errors["random"], errors["magnitude"]), errors


def test_two_bits_for_many_columns_lose_less_than_four_for_few() -> None:
    """Compare widths for inputs without a few columns that stand out."""
    weight, x = wide()[0], correlated_inputs(600, 256)
    errors = [output_error(squeeze(weight, x, 1.75, widths=w).weight_OI, weight, x) for w in ("1+2", "1+3", "1+4")]
    assert errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize(("bits", "widths"), [(1.75, (1, 2)), (2.5, (2, 3)), (3.5, (3, 4)), (6.0, (3, 4))])
def test_auto_takes_the_neighbouring_widths_that_the_target_pays_for(bits: float, widths: tuple[int, int]) -> None:
    split = split_columns(512, 2048, Bits(bits), Config())
    assert (split.base_bits, split.salient_bits) == widths
    assert (split.count == 2048) == (bits == 6.0)


def test_columns_are_chosen_in_neighbourhoods() -> None:
    weight, x = wide()
    chosen = squeeze(weight, x, 1.6, choose_columns=8, rounds=0).parts[0].columns_C
    assert torch.equal(chosen.view(-1, 8), chosen.view(-1, 8)[:, :1] // 8 * 8 + torch.arange(8))


def drifted() -> tuple[torch.Tensor, CalibrationData]:
    """Return weights, and calibration data of inputs X in the compressed model and F in the full one."""
    weight, full = wide()
    noise = torch.randn(full.shape, generator=torch.Generator().manual_seed(9))
    x = full * 0.9 + 0.3 * noise
    statistics = Statistics(Needs(gram=True, full=True))
    statistics.add(x, full)
    return weight, CalibrationData({"m": statistics})


@pytest.mark.parametrize("supervise", squeeze10.SUPERVISIONS)
def test_every_supervision_is_best_at_what_it_minimises(supervise: str) -> None:
    """Compare with float64 sums over the inputs themselves: ‖(W − Q)X‖, ‖(W − Q)F‖, ‖WF − QX‖."""
    weight, calib = drifted()
    _, full = wide()
    noise = torch.randn(full.shape, generator=torch.Generator().manual_seed(9))
    f, x, w = full.double(), (full * 0.9 + 0.3 * noise).double(), weight.double()
    found = {}
    for name in squeeze10.SUPERVISIONS:
        targets = {"m": Bits(2.0)}
        config = Config(supervise=name, rounds=12, learn_rounds=0)
        q = squeeze10.compress(make_block({"m": weight}), calib, targets, config, torch.Generator())["m"].weight_OI
        q = q.double()
        lost = {"prefix": (w - q) @ x.T, "inputs": (w - q) @ f.T, "outputs": w @ f.T - q @ x.T}[supervise]
        found[name] = float(lost.square().sum())
    assert min(found, key=found.__getitem__) == supervise, found


def test_a_part_of_the_way_to_the_full_outputs_lies_between() -> None:
    weight, calib = drifted()
    found = []
    for frac in (0.5, 1.0):
        task = RoundingProblem.of(calib.statistics["m"], Config(supervise="outputs", supervise_frac=frac))
        assert task is not None
        found.append(task.wanted(weight))
    torch.testing.assert_close(found[0], (weight + found[1]) / 2)


def test_a_choice_by_element_counts_its_mask() -> None:
    weight, x = wide()
    options = {"granularity": "element", "widths": "1+4", "rounds": 0}
    packed = squeeze(weight, x, 2.8, **options)
    assert 2.8 - 24 / weight.numel() <= packed.detail["method_bits"] <= 2.8
    levels = [len(row.unique()) for row in packed.weight_OI]
    assert max(levels) <= 18 and min(levels) > 4
    fewer = squeeze(weight, x, 2.4, **options)
    assert output_error(packed.weight_OI, weight, x) < output_error(fewer.weight_OI, weight, x)
    random = squeeze(weight, x, 2.8, choose="random", **options)
    assert output_error(packed.weight_OI, weight, x) < output_error(random.weight_OI, weight, x)
    with pytest.raises(TargetError, match=r"a choice by element needs at least 2\.188 bits for a 96×256 matrix"):
        squeeze(weight, x, 1.75, **options)
    with pytest.raises(ValueError, match="needs widths=1\\+4, rounds=0 and learn_rounds=0"):
        Config(granularity="element")


def test_rounds_lower_the_error_and_more_bits_too() -> None:
    weight, x = wide()
    by_rounds = [output_error(squeeze(weight, x, 1.6, rounds=rounds).weight_OI, weight, x) for rounds in (0, 2, 8)]
    assert by_rounds[0] > by_rounds[1] > by_rounds[2]
    by_bits = [output_error(squeeze(weight, x, bits).weight_OI, weight, x) for bits in (1.3, 1.6, 2.2, 4.0)]
    assert by_bits == sorted(by_bits, reverse=True)


def test_salient_columns_are_those_with_large_inputs() -> None:
    weight, x = wide()
    packed = squeeze(weight, x, 1.6, widths="1+4")
    salient = set(packed.parts[0].columns_C.tolist())
    large = set(x.square().sum(0).argsort(descending=True)[:20].tolist())
    assert len(large & salient) >= 16 and packed.parts[0].bits == 4 and packed.parts[1].bits == 1
    assert packed.detail["salient_columns"] == len(salient)


def test_latent_weights_begin_at_the_codes_that_were_found() -> None:
    weight, _ = wide()
    groups = groups_of(0, 64, 4, "midrise", 0) + groups_of(64, 256, 1, "free", 64)
    rounded = nearest(weight, groups, clip=True).storable()
    rounded.code_OI[:, ::5] = 1 - rounded.code_OI[:, ::5].clamp_max(1)  # codes that rounding would not choose
    latent = Latent.start(rounded, weight, torch.arange(256))
    assert torch.equal(latent.current().code_OI, rounded.code_OI)
    torch.testing.assert_close(latent.current().values_OI, rounded.values_OI)


def test_gradients_of_scales_and_offsets_equal_autograd() -> None:
    weight = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    groups = groups_of(0, 8, 4, "midrise", 0) + groups_of(8, 32, 1, "free", 8)
    rounded = nearest(weight[:, order].contiguous(), groups, clip=False).storable()
    latent = Latent.start(rounded, weight[:, order].contiguous(), order)
    gradient = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
    scale = rounded.scale_OG.clone().requires_grad_(True)
    offset = rounded.offset_OG.clone().requires_grad_(True)
    group = rounded.grid.group_I.long()
    own = torch.where(latent.free_G, offset, -7.5 * scale)
    values = rounded.code_OI * scale[:, group] + own[:, group]
    (values * gradient[:, order]).sum().backward()
    latent.set_gradients(gradient, latent.levels())
    torch.testing.assert_close(latent.weight_OI.grad, gradient[:, order])
    torch.testing.assert_close(latent.scale_OG.grad, scale.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(latent.offset_OG.grad, offset.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rate_frac", "improves"), [(0.01, True), (50.0, False)])
def test_learning_never_ends_above_its_start(rate_frac: float, improves: bool, tmp_path: Path) -> None:
    """Learn with one bit for all columns, where much can be gained."""
    block, stream = first_block(tmp_path, windows=16)
    config = Config(learn_rounds=10, samples=14, rate_frac=rate_frac, target="block", rounds=2)
    calib = CalibrationData(collect(block, stream, squeeze10.needs(config))[0], stream)
    for record in squeeze10.compress(
        block, calib, dict.fromkeys(block.linears, Bits(3.0)), config, torch.Generator()
    ).values():
        start, end = record.detail["heldout_error_start"], record.detail["heldout_error"]
        assert (end < 0.95 * start) if improves else (end == start)
        assert record.note == ("" if improves else squeeze10.KEPT_START)


def test_without_tokens_the_matrix_is_rounded_and_the_note_says_so() -> None:
    weight, x = wide()
    packed = squeeze(weight, x[:0], 1.75)
    assert "rounded to nearest" in packed.note and torch.isfinite(packed.weight_OI).all()
    h = damped(x.T @ x, 0.01)
    assert quadratic_error(packed.weight_OI, weight, h) < quadratic_error(torch.zeros_like(weight), weight, h)
    assert run_method(squeeze10, weight, x[:0], Bits(1.75)).shape == weight.shape


def published(weight: np.ndarray, inputs: np.ndarray, salient: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the salient columns and the weights of the published form in float64, entry by entry.

    Stage 1 rounds all to four bits, PBAR picks the columns, one sweep rounds the salient columns first.
    """
    rows, columns = weight.shape
    gram = inputs.T @ inputs
    gram += 0.01 * np.trace(gram) / columns * np.eye(columns)

    def four_bits(row: np.ndarray) -> np.ndarray:
        """Return the step of the least squared error of 25 shrunk ranges."""
        best = (np.inf, 0.0)
        for share in np.linspace(0.4, 1.0, 25):
            step = max(2 * share * np.abs(row).max() / 15, 2.0**-24)
            levels = (np.clip(np.round(row / step + 7.5), 0, 15) - 7.5) * step
            best = min(best, (float(((levels - row) ** 2).sum()), step))
        return np.array([(code - 7.5) * best[1] for code in range(16)])

    def one_bit(row: np.ndarray) -> np.ndarray:
        return row.mean() + np.array([-1, 1]) * np.abs(row - row.mean()).mean()

    def swept(start: np.ndarray, order: list[int], parts: list[tuple[list[int], object]]) -> np.ndarray:
        """Round column after column; the error of each moves to those after it (GPTQ)."""
        left, out = start.copy(), np.zeros_like(start)
        for part, fit in parts:
            levels = [fit(left[row, part]) for row in range(rows)]
            for column in part:
                after = order[order.index(column) + 1 :]
                inverse = np.linalg.inv(gram[np.ix_([column, *after], [column, *after])])
                for row in range(rows):
                    out[row, column] = min(levels[row], key=lambda level: abs(level - left[row, column]))
                    left[row, after] -= (left[row, column] - out[row, column]) * inverse[0, 1:] / inverse[0, 0]
        return out

    every = list(range(columns))
    staged = swept(weight, every, [(every, four_bits)])
    binary = np.array([[min(one_bit(row), key=lambda level: abs(level - entry)) for entry in row] for row in staged])
    scores = ((staged - binary) ** 2).sum(0) * gram.diagonal()
    picked = sorted(sorted(every, key=lambda column: -scores[column])[:salient])
    rest = [column for column in every if column not in picked]
    return np.array(picked), swept(staged, picked + rest, [(picked, four_bits), (rest, one_bit)])


def test_the_published_split_is_what_a_slow_reference_makes_of_its_definition() -> None:
    weight = torch.randn(7, 40, generator=torch.Generator().manual_seed(3))
    x = correlated_inputs(160, 40)
    x[:, ::7] *= 6
    packed = squeeze(weight, x, 8.0, salient_frac=0.2, rounds=0)
    columns, wanted = published(weight.double().numpy(), x.double().numpy(), salient=8)
    assert packed.parts[0].columns_C.tolist() == columns.tolist()
    assert [(part.bits, len(part.columns_C)) for part in packed.parts] == [(4, 8), (1, 32)]
    np.testing.assert_allclose(packed.weight_OI.numpy(), wanted, rtol=2e-3, atol=2e-3)  # scales are float16


@pytest.mark.parametrize(("rows", "columns", "frac"), [(96, 256, 0.2), (64, 100, 0.2), (33, 64, 0.07), (40, 48, 0.9)])
@pytest.mark.parametrize("widths", ["auto", "1+2"])
def test_a_named_share_is_kept_and_its_bits_are_those_of_the_file(
    rows: int, columns: int, frac: float, widths: str
) -> None:
    weight, x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)), correlated_inputs(300, columns)
    config = Config(salient_frac=frac, widths=widths)
    packed = squeeze(weight, x, 1.0, salient_frac=frac, widths=widths, rounds=1)
    count = round(frac * columns)
    assert packed.detail["salient_columns"] == count
    assert [(part.bits, len(part.columns_C)) for part in packed.parts] == [
        (4 if widths == "auto" else 2, count),
        (1, columns - count),
    ]
    assert squeeze10.named_bits(rows, columns, config) == 8 * packed.nbytes(torch.bfloat16) / weight.numel()
    stored = packed.pack(torch.float32, "codes")
    assert stored is not None and torch.equal(packed.decode(torch.float32), packed.weight_OI)


def test_a_named_share_of_single_weights_counts_its_mask() -> None:
    weight, x = wide()
    packed = squeeze(weight, x, 1.0, salient_frac=0.2, granularity="element", rounds=0)
    assert packed.detail["salient_weights"] == round(0.2 * weight.numel())
    config = Config(salient_frac=0.2, granularity="element", rounds=0, learn_rounds=0)
    assert (
        packed.detail["method_bits"] == squeeze10.named_bits(96, 256, config) == pytest.approx(2.6 + 0.1875, abs=1e-3)
    )


@pytest.mark.parametrize("frac", [-0.1, 1.0, 2])
def test_a_share_that_is_none_is_refused(frac: float) -> None:
    with pytest.raises(ValueError, match="salient_frac must lie between 0 and 1"):
        Config(salient_frac=frac)
