"""Trellis: true bits within the target, less error than grids of equal size, learning that never hurts, and loading."""

from pathlib import Path

import pytest
import torch

import niwaki
from niwaki.compression.run_record import read_lines, read_run
from niwaki.config.targets import Bits, parse_target
from niwaki.errors import InputError, TargetError
from niwaki.formats.packed import Packed
from niwaki.methods import squeeze10, trellis
from niwaki.methods.shared import trellis_codes
from niwaki.methods.shared.rounding import damped
from niwaki.methods.trellis import Config, TrellisLatent, TrellisSplit, split_widths
from niwaki.runtime.trellis_linear import TrellisLinear
from support.models import calibration_of, correlated_inputs, make_block, tiny_llama, write_texts


def code(weight: torch.Tensor, x: torch.Tensor, bits: float, **options: int) -> Packed:
    config = Config(learn_rounds=0, **options)
    calib = calibration_of(make_block({"m": weight}), x, trellis.needs(config))
    return trellis.compress(make_block({"m": weight}), calib, {"m": Bits(bits)}, config, torch.Generator())["m"]


def wide(rows: int = 96, columns: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return weight, correlated_inputs(600, columns)


def output_error(found: torch.Tensor, weight: torch.Tensor, x: torch.Tensor) -> float:
    return float((x @ (found - weight).T).square().sum() / (x @ weight.T).square().sum())


@pytest.mark.parametrize("rows", [96, 70])
@pytest.mark.parametrize("bits", [1.9, 2.6, 3.6, 4.6])
def test_everything_stored_fits_the_target_and_uses_it(bits: float, rows: int) -> None:
    weight, x = wide(rows)
    packed = code(weight, x, bits, rounds=0)
    found, budget = packed.nbytes(torch.bfloat16), bits * rows * 128 / 8
    assert found == trellis.stored_bytes("m", rows, 128, Bits(bits), Config())
    assert found <= budget
    assert found == trellis.trellis_bytes(rows, {4: 128}) or found > budget - 96 - (256 + 2 * rows + 16)
    assert torch.equal(packed.decode(torch.float32), packed.weight_OI)


def test_a_target_below_the_format_names_the_least_it_can_reach() -> None:
    with pytest.raises(TargetError, match=r"m: target 1\.1bit: a 96×256 matrix needs at least 1\.146 bits"):
        split_widths(96, 256, parse_target("1.1bit"), "m: ")
    assert split_widths(96, 256, Bits(1.15)) == TrellisSplit(1, 2, 0)
    assert trellis.min_bits(96, 256, Config()) == pytest.approx(1.1458, abs=1e-4)


def test_it_loses_less_than_columns_of_two_widths() -> None:
    weight, x = wide(256, 256)
    config = squeeze10.Config(learn_rounds=0)
    calib = calibration_of(make_block({"m": weight}), x, squeeze10.needs(config))
    mixed = squeeze10.compress(make_block({"m": weight}), calib, {"m": Bits(2.1)}, config, torch.Generator())["m"]
    coded = code(weight, x, 2.1)
    assert coded.nbytes(torch.bfloat16) <= 2.1 * weight.numel() / 8
    assert output_error(coded.weight_OI, weight, x) < 0.8 * output_error(mixed.weight_OI, weight, x)


def test_sweep_refits_and_descent_each_lower_the_error() -> None:
    weight, x = wide()
    gram = damped(x.T @ x, 0.03)

    def error(codes: trellis_codes.TrellisCodes) -> float:
        missing = codes.values_OI - weight
        return float(((missing @ gram) * missing).sum())

    calib = calibration_of(make_block({"m": weight}), x, trellis.needs(Config()))
    problem = trellis._Problem.of(calib.statistics["m"], Config())
    assert problem is not None
    start = trellis_codes.start_codes(weight, *TrellisSplit(2, 3, 32).parts(problem.order_I))
    nearest = trellis_codes.nearest_path(start, weight)
    swept = trellis_codes.round_in_order(start, weight, problem.upper_II, problem.order_I)
    refitted = trellis_codes.refit_scales(swept, weight, gram)
    descended = trellis_codes.descend(refitted, weight, gram)
    errors = [error(codes) for codes in (nearest, swept, refitted, descended)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.9 * errors[0]


def test_a_matrix_that_no_token_reached_takes_the_nearest_path() -> None:
    weight, x = wide()
    config = Config(learn_rounds=0)
    calib = calibration_of(make_block({"m": weight}), x[:0], trellis.needs(config))
    found = trellis.compress(make_block({"m": weight}), calib, {"m": Bits(2.5)}, config, torch.Generator())["m"]
    assert "no calibration token" in found.note
    assert float((found.weight_OI - weight).square().sum() / weight.square().sum()) < 0.11


def test_gradients_have_the_layout_of_their_parameters() -> None:
    """Step the fused optimizer, which a GPU takes and which refuses others."""
    weight, _ = wide()
    codes = trellis_codes.start_codes(weight, *TrellisSplit(2, 3, 32).parts(torch.arange(128)))
    latent = TrellisLatent.start(codes, weight.T.contiguous().T)
    latent.set_gradients(torch.randn(128, 96).bfloat16().T)
    for tensor in (latent.weight_OI, latent.scale_OP):
        assert tensor.grad is not None and tensor.grad.dtype == tensor.dtype == torch.float32
        assert tensor.is_contiguous() and tensor.grad.is_contiguous()
    torch.optim.Adam([latent.weight_OI, latent.scale_OP], fused=True).step()


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trellis")
    model, text = (
        tiny_llama(folder / "model", blocks=2, hidden_size=64, intermediate_size=96, num_key_value_heads=4),
        write_texts(folder / "text.jsonl"),
    )
    niwaki.compress(
        model, folder / "out", method="trellis", target="3bit", device="cpu", dtype="float32",
        options={"learn_rounds": 2, "samples": 4, "rounds": 1, "ahead": 1},
        calibration={"files": (str(text),), "samples": 8, "seq_len": 16},
    )  # fmt: skip
    return folder / "out"


def test_a_result_loads_with_its_rings_and_counts_its_bits(learned: Path) -> None:
    loaded = niwaki.load(learned, device="cpu", dtype="float32")
    assert sum(isinstance(module, TrellisLinear) for module in loaded.modules()) == 14
    lines = read_lines(learned)
    assert all(line.stored is not None and "trellis" in line.stored for line in lines)
    assert read_run(learned).result.bits <= 3
    assert loaded(torch.arange(8)[None]).logits.isfinite().all()


def test_what_cannot_take_a_trellis_says_so(learned: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="coded by a trellis"):
        niwaki.export(learned, tmp_path / "exported", to="compressed-tensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{"rounds": -1}, {"encode_every": 0}, {"rate_frac": 0.0}, {"damping_frac": 2.0}])
def test_options_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"expected|must"):
        Config(**options)
