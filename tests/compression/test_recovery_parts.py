"""Parts of a recovery: the loss and its gradients against float64, the memory plan, and the windows of the steps."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from niwaki.compression.recovery.codes import CodesLinear, LearnedGrid, LearnedTrellis, Mode, _Decode
from niwaki.compression.recovery.memory import Learning, Size, choose, plan_memory
from niwaki.compression.recovery.teacher import Resident, Student, Text, likely, likely_divergence
from niwaki.compression.recovery.trained import prepare
from niwaki.compression.recovery.training import Windows, batch_windows, default_rate, recompute_blocks
from niwaki.errors import InputError, NumericalError
from niwaki.formats.packed import PackedTensors, decode_record
from niwaki.formats.quantized import QuantizedColumns
from niwaki.kernels.trellis import encode_reference
from niwaki.methods.shared.divergence import divergence
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.decoder import Decoder
from niwaki.runtime.load import load
from niwaki.runtime.trellis_linear import TrellisLinear
from support.models import CPU, tiny_llama
from support.trellis_records import trellis_matrix

SEVEN = Size(6_476_005_376, 262_410_240, 6_738_415_616, 32, 4096, 42_496, 32 * 78_080, 32_000)  # Llama-2-7B


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_divergence_is_that_of_the_definition() -> None:
    wanted_NV, logits_NV = 3 * normal(5, 11), 3 * normal(5, 11, seed=1)
    p, q = (values.exp() / values.exp().sum(1, keepdim=True) for values in (wanted_NV, logits_NV))
    assert torch.allclose(divergence(wanted_NV, logits_NV), (p * (p / q).log()).sum(1), atol=1e-12)
    assert torch.autograd.gradcheck(lambda z: divergence(wanted_NV, z).sum(), logits_NV.requires_grad_())


def test_likely_tokens_give_the_divergence_of_them_and_of_all_others_as_one() -> None:
    wanted_NV, logits_NV = 3 * normal(5, 11), 3 * normal(5, 11, seed=1)
    whole = divergence(wanted_NV, logits_NV)
    log_p_NK, ids_NK = wanted_NV.log_softmax(-1).topk(11)
    assert torch.allclose(likely_divergence(log_p_NK, ids_NK, logits_NV), whole, atol=1e-12)
    log_p_NK, ids_NK = wanted_NV.log_softmax(-1).topk(4)
    p, q = wanted_NV.softmax(-1).gather(1, ids_NK), logits_NV.softmax(-1).gather(1, ids_NK)
    p, q = (torch.cat([one, 1 - one.sum(1, keepdim=True)], dim=1) for one in (p, q))
    found = likely_divergence(log_p_NK, ids_NK, logits_NV)
    assert torch.allclose(found, (p * (p / q).log()).sum(1), atol=1e-9) and (found <= whole).all()
    assert torch.autograd.gradcheck(
        lambda z: likely_divergence(log_p_NK, ids_NK, z).sum(), logits_NV.requires_grad_(), atol=1e-6
    )
    kept, ids = likely(wanted_NV, 4)
    assert torch.equal(ids.long(), ids_NK) and torch.allclose(kept.double(), log_p_NK, atol=1e-5)


def test_the_gradient_of_codes_is_that_of_scales_and_passes_the_rounding() -> None:
    """Check scales and offsets against finite differences, and latent numbers against the sum with scales held."""
    latent_OC = (3.4 * normal(3, 10).abs()).clamp(0, 7)
    scale_OG, offset_OG, weight_OC = 0.1 + normal(3, 3).abs(), normal(3, 3, seed=2), normal(3, 10, seed=3)

    def value(scale: Tensor, offset: Tensor) -> Tensor:
        return (_Decode.apply(latent_OC, scale, offset, 4, (0, 7), torch.float64) * weight_OC).sum()

    scales = (scale_OG.requires_grad_(), offset_OG.requires_grad_())
    found = torch.autograd.grad(value(*scales), scales)
    for number, one in enumerate(scales):
        for place in ((0, 0), (2, 2), (1, 1)):
            moved = [each.detach().clone() for each in scales]
            moved[number][place] += 1e-3
            expected = (value(*moved) - value(*(each.detach() for each in scales))) / 1e-3
            assert float(found[number][place]) == pytest.approx(float(expected), rel=1e-5)
            assert one.shape == found[number].shape
    latent_OC.requires_grad_()
    (gradient_OC,) = torch.autograd.grad(value(*scales), [latent_OC])
    wide_OC = scale_OG.repeat_interleave(4, dim=1)[:, :10]
    assert torch.allclose(gradient_OC, (wide_OC * weight_OC).to(gradient_OC.dtype), rtol=1e-6)


@pytest.mark.parametrize("grid", ["affine", "symmetric", "midrise", "free"])
def test_a_part_decodes_as_the_file_does_and_is_written_back(grid: str) -> None:
    generator = torch.Generator().manual_seed(0)
    code_OC = torch.randint(0, 8, (4, 20), generator=generator)
    scale_OG = (0.1 + torch.rand(4, 3, generator=generator)).half()
    offset_OG = torch.randn(4, 3, generator=generator).half() if grid == "free" else None
    zero_OG = torch.randint(0, 8, (4, 3), generator=generator) if grid == "affine" else None
    part = QuantizedColumns(torch.arange(20), 3, grid, 8, code_OC, scale_OG, offset_OG, zero_OG)
    for mode in ("weights", "low-rank", "scales"):
        learned = LearnedGrid(part, mode, 2, generator, frozen=False)  # type: ignore[arg-type]
        assert torch.allclose(learned.weight(torch.float32), part.decode(), atol=1e-6)
        for name, tensor in learned.columns().tensors().items():
            assert torch.equal(tensor, part.tensors()[name]), name
    with torch.no_grad():
        for one in learned.learned():
            one.parameter.add_(0.3)
    assert torch.allclose(learned.weight(torch.float32), learned.columns().decode(), atol=1e-6), "what is written"


@pytest.mark.parametrize("others", [None, 3])
@pytest.mark.parametrize("mode", ["weights", "scales"])
def test_paths_decode_as_the_file_does_and_pass_gradients(mode: Mode, others: int | None) -> None:
    parts = trellis_matrix(40, 12, 2, others)
    record = PackedTensors.of_trellis(parts, (40, 12))
    packed = TrellisLinear(40, 12, record.description, bias=False)
    packed.load_state_dict(record.tensors)
    new = CodesLinear(packed, mode, 2, torch.Generator(), frozen=False)
    written = new.packed()
    assert written.description == record.description and written.tensors.keys() == record.tensors.keys()
    assert all(torch.equal(tensor, record.tensors[name]) for name, tensor in written.tensors.items())
    new.search()
    assert torch.equal(new.weight_OI(torch.float32), packed.weight_OI(torch.float32)), "its own path is the nearest"
    probe_OI = normal(40, 12, seed=4).float()
    (new.weight_OI(torch.float32) * probe_OI).sum().backward()
    for part, own in zip(parts, new.parts, strict=True):
        level_S, scale_O = part.level_S.double(), part.scale_O.double()
        level_S.requires_grad_(), scale_O.requires_grad_()
        level_OC = level_S[part.state_UC[:40].long()]
        level_OC.retain_grad()
        (level_OC * scale_O[:, None] * probe_OI[:, part.columns_C].double()).sum().backward()
        first = level_OC if mode == "weights" else level_S
        for found, wanted in zip(own.learned(), (first.grad, scale_O.grad), strict=True):  # type: ignore[operator]
            gradient = found.parameter.grad
            assert gradient.dtype == torch.float32 and gradient.is_contiguous()
            assert torch.allclose(gradient.double(), wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for one in new.learned():
            one.parameter.mul_(1.7)
        new.clamp()
    moved = decode_record(new.packed().tensors, record.description)
    assert torch.equal(moved, new.weight_OI(torch.float32)), "what is written"
    assert not torch.equal(moved, packed.weight_OI(torch.float32))


def test_levels_of_zero_stay_where_zeros_are_kept() -> None:
    part = trellis_matrix(32, 8, 2)[0]
    part.level_S[::3] = 0
    for frozen in (True, False):
        learned = LearnedTrellis(part, "weights", frozen)
        assert (learned.latent_OC is None) == frozen, "a code of zero stays one"
        level, _ = LearnedTrellis(part, "weights" if frozen else "scales", frozen).learned()
        assert (level.keep is None) != frozen
        assert level.keep is None or torch.equal(level.keep, part.level_S != 0)


def test_scales_that_cannot_be_stored_are_refused() -> None:
    learned = LearnedTrellis(trellis_matrix(32, 8, 2)[0], "scales", frozen=False)
    with torch.no_grad():
        learned.scale_O[3] = 1e6
    with pytest.raises(NumericalError, match="lower the rate"):
        learned.columns()


def test_paths_follow_their_latent_levels_to_the_nearest_codes() -> None:
    for part in trellis_matrix(40, 12, 2, 3):
        learned = LearnedTrellis(part, "weights", frozen=False)
        assert learned.latent_OC is not None
        with torch.no_grad():
            learned.scale_O.mul_(2.0)
            learned.search()
            assert torch.equal(learned.columns().decode(), part.decode() * 2.0), "scales move no path"
            noise_OC = normal(*learned.latent_OC.shape, seed=5).float()
            learned.latent_OC.add_(learned.latent_OC.square().mean().sqrt() * noise_OC)
        scale_O, level_S, wanted_OC = (
            learned.scale_O.detach().double(),
            part.level_S.double(),
            learned.latent_OC.detach(),
        )

        before = _missed(learned.state_UC, level_S, scale_O, wanted_OC)
        learned.search()
        assert torch.equal(learned.weight(torch.float32), learned.columns().decode()), "what is written"
        state_UC = encode_reference(wanted_OC.double(), scale_O.square(), level_S, part.bits)
        nearest = _missed(state_UC, level_S, scale_O, wanted_OC)
        found = _missed(learned.state_UC, level_S, scale_O, wanted_OC)
        assert found == pytest.approx(nearest, rel=1e-3) and nearest < before


def _missed(state_UC: Tensor, level_S: Tensor, scale_O: Tensor, wanted_OC: Tensor) -> float:
    values_OC = level_S[state_UC[: len(scale_O)].long()]
    return float(((values_OC - wanted_OC) * scale_O[:, None]).square().sum())


def test_the_plan_counts_what_is_learned_of_paths() -> None:
    record = PackedTensors.of_trellis(trellis_matrix(40, 12, 2, 3), (40, 12))
    size = Size(480, 0, 0, 1, 12, 40, 52, 16)
    learning = Learning.of({"one": record.description}, rank=2)
    assert learning.learned(size) == 480 + 2 * (40 + 256)
    assert [learning.modes(train, size) for train in ("auto", "weights", "low-rank", "scales")] == [
        ("scales",), ("weights",), ("scales",), ("scales",)
    ]  # fmt: skip
    more = Size(1000, 0, 0, 1, 12, 40, 52, 16)
    assert learning.modes("auto", more) == ("weights", "low-rank") and learning.modes("scales", more) == ("scales",)
    part = {"bits": 2, "grid": "affine", "group": 8, "columns": 12}
    grids = Learning.of({"one": {"shape": [40, 12], "parts": [part]}}, rank=2)
    assert (grids.learned(size), grids.paths) == (480 + 40 * 2 * 2, 0)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Decoder]:
    folder = tmp_path_factory.mktemp("parts")
    dense = tiny_llama(folder / "dense", initializer_range=0.2)
    model = load(dense, device="cpu", dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_proj" in name:
                parameter.mul_(parameter.abs() > 0.1)
    return load(dense, device="cpu", dtype=torch.float64), model, Decoder(Checkpoint.open(dense), CPU)


def test_the_gradient_of_the_model_is_that_of_the_whole_loss(models: tuple[Any, Any, Decoder]) -> None:
    """Add up slices of logits and recomputed blocks to what autograd gives for the loss in one piece."""
    dense, model, skeleton = models
    trained = prepare(model, skeleton, mode="weights", rank=1, seed=0, pruned=True)
    for one in trained.learned:
        one.parameter.data = one.parameter.data.double()
    model.double()
    ids_BT = torch.arange(24).view(2, 12) * 37 % 4096
    p, q = dense(ids_BT).logits.detach().log_softmax(-1), model(ids_BT).logits.log_softmax(-1)
    whole = (p.exp() * (p - q)).sum(-1).mean()
    expected = torch.autograd.grad(whole, trained.parameters)
    recompute_blocks(model)
    student = Student(model, Resident(dense), logit_bytes=4096 * 4 * 5)
    loss = student.loss([0, 1], ids_BT, backward=1.0)
    assert float(loss) == pytest.approx(float(whole.detach()), rel=1e-6)
    for parameter, gradient in zip(trained.parameters, expected, strict=True):
        assert parameter.grad is not None and torch.allclose(parameter.grad, gradient, rtol=1e-3, atol=1e-6)
    zeros = [one.parameter.detach() == 0 for one in trained.learned]
    trained.mask_gradients()
    assert all(not one.parameter.grad[zero].any() for one, zero in zip(trained.learned, zeros, strict=True))  # type: ignore[index]
    text = Student(model, Text(), logit_bytes=4096 * 4 * 5).loss([0, 1], ids_BT)
    assert float(text) == pytest.approx(float(model(ids_BT, labels=ids_BT).loss), rel=1e-5)


def test_a_7b_fits_24_gb_in_thin_matrices_with_a_cached_teacher() -> None:
    size = 24 * 10**9
    pruned = choose(SEVEN, Learning("weights", 16, pruned=True), size, tokens=4096, window=512, itemsize=2, best=False)
    assert (pruned.mode, pruned.resident, pruned.recompute) == ("low-rank", False, True)
    assert 14e9 < pruned.total < 24e9
    codes = Learning("weights", 16, 1 / 64, codes=True)
    quantized = choose(SEVEN, codes, size, tokens=4096, window=512, itemsize=2, best=False)
    assert quantized.total < pruned.total and quantized.mode == "low-rank"
    whole = choose(SEVEN, Learning("weights", 16), 141 * 10**9, tokens=4096, window=512, itemsize=2, best=False)
    assert (whole.mode, whole.resident) == ("weights", True)
    with pytest.raises(InputError, match=r"needs 1\d.\d GB in its smallest form .low-rank., and there are 8.0 GB"):
        choose(SEVEN, Learning("weights", 16), 8 * 10**9, tokens=4096, window=512, itemsize=2, best=False)


def test_the_plan_grows_with_what_it_counts() -> None:
    given: dict[str, Any] = {"micro_tokens": 2048, "itemsize": 2, "best": False}
    small = plan_memory(SEVEN, Learning("low-rank", 16), recompute=True, resident=False, **given)
    for change, more in [
        ({"learning": Learning("low-rank", 32)}, 16 * SEVEN.sides * 16),
        ({"resident": True}, 2 * SEVEN.dense_weights),
        ({"resident": True, "held_tokens": 512}, 2 * (SEVEN.dense_weights + 512 * SEVEN.hidden)),
    ]:
        other = {"learning": Learning("low-rank", 16), "recompute": True, "resident": False, **change}
        assert plan_memory(SEVEN, **other, **given).total - small.total == more


def test_steps_take_every_window_once_before_any_again_and_shares_hold() -> None:
    windows = Windows.of([(torch.arange(40)[:, None], 64)], 4, None, 0)
    assert windows.held == [35, 36, 37, 38, 39] and len(windows.steps) == 16, "a compression took the first ones"
    drawn = [row for rows in windows.steps for row in rows]
    assert sorted(drawn[:35]) == list(range(35)) and set(drawn[35:]) <= set(range(35))
    mixed = Windows.of([(torch.arange(30)[:, None], 48), (torch.arange(100, 200)[:, None], 16)], 4, None, 0)
    rows = [row for rows in mixed.steps for row in rows]
    assert sum(row < 30 for row in rows) == 48 and not set(rows) & set(mixed.held)
    assert any(row < 30 for row in mixed.held) and any(row >= 30 for row in mixed.held)
    assert torch.equal(mixed.read([29, 30], CPU), torch.tensor([[29], [100]]))
    assert Windows.of([(torch.arange(40)[:, None], 64)], 4, None, 1).steps != windows.steps


@pytest.mark.parametrize(
    ("tokens", "windows"), [(100_000, 4), (300_000, 4), (1_000_000, 5), (3_000_000, 15), (10_000_000, 49)]
)
def test_steps_grow_with_the_budget(tokens: int, windows: int) -> None:
    assert batch_windows(tokens, 512) == windows


def test_few_steps_are_long_ones() -> None:
    found = [default_rate(steps) for steps in (1, 24, 100, 400, 1600, 10_000)]
    assert found == pytest.approx([0.01, 0.01, 0.006, 0.003, 0.0015, 0.001])


def test_a_cached_teacher_learns_as_a_resident_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cache the whole vocabulary: then both are one loss, up to float16 and the order of sums."""
    import niwaki
    from niwaki.compression import recover as module
    from niwaki.compression.recovery import teacher
    from support.models import write_texts

    text = str(write_texts(tmp_path / "text.jsonl"))
    model = tiny_llama(tmp_path / "model", initializer_range=0.2)
    niwaki.compress(model, tmp_path / "cut", method="magnitude", target="0.5", device="cpu")
    given: dict[str, Any] = {"data": text, "steps": 6, "batch": 4, "seq_len": 32, "rate": 0.005, "device": "cpu"}
    resident = niwaki.recover(tmp_path / "cut", tmp_path / "resident", **given)
    size, choose_way = teacher.likely, module.choose
    monkeypatch.setattr(teacher, "likely", lambda logits: size(logits, 4096))
    monkeypatch.setattr(teacher, "CACHED_TOKENS", 32 * 20)

    def without(size: Size, learning: Learning, budget: int, **more: Any) -> Any:
        plan = choose_way(size, learning, budget, **more)
        return type(plan)(**{**plan.__dict__, "resident": False, "recompute": True})

    monkeypatch.setattr(module, "choose", without)
    cached = niwaki.recover(tmp_path / "cut", tmp_path / "cached", **given)
    for name in ("heldout_loss_before", "heldout_loss"):
        assert cached["result"][name] == pytest.approx(resident["result"][name], rel=2e-3)
    assert cached["result"]["heldout_loss"] < cached["result"]["heldout_loss_before"]
    assert not (tmp_path / "cached/niwaki/journal").exists()
