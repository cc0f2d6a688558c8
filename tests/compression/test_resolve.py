"""A recipe resolved for a model: what plan, compress and the early check share."""

from pathlib import Path
from typing import Any

import pytest

from niwaki.compression.resolve import recipe_stages, resolve, resolve_allocation
from niwaki.config.recipe import make_recipe
from niwaki.config.targets import Bits, PrunedBits, Sparsity
from niwaki.errors import CalibrationError, InputError, NiwakiError, TargetError
from niwaki.methods.method import MethodKind
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.decoder import Decoder, open_decoder
from support.models import CPU, tiny_llama


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return open_decoder(tiny_llama(tmp_path_factory.mktemp("resolve") / "model"), CPU)


def recipe_of(**fields: Any) -> Any:
    return make_recipe({"calibration": {"files": ["text.txt"], "samples": 16, "seq_len": 32}, **fields})


def test_every_matrix_has_its_target(decoder: Decoder) -> None:
    recipe = recipe_of(method="sparsegpt+gptq", target="0.5+4bit", options={"gptq.group": 0})
    plan = resolve(recipe, decoder)
    (stage,) = plan.stages
    assert plan.recipe is recipe and stage.recipe.allocation == "uniform"
    assert stage.target == PrunedBits(Sparsity(0.5), Bits(4)) and len(stage.targets) == len(decoder)
    assert {target for block in stage.targets for target in block.values()} == {stage.target}
    assert [step.name for step in stage.steps] == ["sparsegpt", "gptq"] and stage.kind is MethodKind.WALK
    assert stage.needs.gram and (stage.windows, stage.tokens) == (16, 32)


def test_a_method_without_needs_gets_windows_only_if_text_is_given(decoder: Decoder) -> None:
    given = {"method": "magnitude", "target": "0.5"}
    assert resolve(recipe_of(**given), decoder).stages[0].windows == 16
    (stage,) = resolve(make_recipe(given), decoder).stages
    assert (stage.windows, stage.tokens) == (0, 0) and not stage.dense_stream
    (stage,) = resolve(make_recipe(given), decoder, dense_stream=True).stages
    assert stage.windows == 128 and stage.dense_stream


def test_bytes_become_bits_of_this_model(decoder: Decoder) -> None:
    recipe = recipe_of(method="squeeze10", target_bytes=decoder.anatomy.weights // 4)
    (unresolved,) = recipe_stages(recipe)
    assert unresolved.target is None and unresolved.recipe.allocation == "sensitivity"
    assert resolve(recipe, decoder).stages[0].target == Bits(2)


def test_the_first_stage_of_a_chain_fits_the_second(decoder: Decoder) -> None:
    recipe = recipe_of(method="comp+sparsegpt+gptq", target="0.3+2:4+4bit", options={"gptq.group": 6})
    first, second = resolve(recipe, decoder, dense_stream=True).stages
    assert (first.kind, second.kind) == (MethodKind.SHAPE, MethodKind.WALK)
    assert first.columns_multiple == 12 and second.columns_multiple == 1  # of groups of 4 and of 6
    assert (first.recipe.method, second.recipe.method) == ("comp", "sparsegpt+gptq")
    assert second.dense_stream and not first.dense_stream


def test_kept_blocks_are_resolved_where_they_are_named(decoder: Decoder) -> None:
    recipe = recipe_of(method="squeeze10", target="2.2bit", keep_blocks="0")
    targets = resolve(recipe, decoder).stages[0].targets
    assert set(targets[0].values()) == {Bits(4)} and set(targets[1].values()) != {Bits(4)}


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"method": "wanda", "target": "0.5", "allocation": "owls"}, InputError, "did you mean 'owl'"),
        ({"method": "wanda", "target": "2:4", "allocation": "owl"}, TargetError, "owl moves unstructured sparsity"),
        ({"method": "wanda", "target": "3:7"}, TargetError, "model.layers.0.self_attn.q_proj: target 3:7"),
        ({"method": "wanda", "target": "0.5", "options": {"owl_spread_frac": 0.1}}, InputError, "needs the allocation"),
        ({"method": "squeeze10", "target": "2bit", "keep_blocks": "9"}, TargetError, "blocks 0 to 2"),
        ({"method": "squeeze10", "target_bytes": 10}, TargetError, "expected 1 to 8"),
        ({"method": "comp+gptq", "target": "0.3"}, TargetError, "a target for comp and one for gptq"),
        ({"method": "shadow", "target": "0.5", "calibration": {"samples": 4}}, InputError, "from 4 windows"),
        ({"method": "shadow", "target": "0.5", "calibration": {"seq_len": 2}}, CalibrationError, "cannot be cut"),
    ],
    ids=lambda value: "",
)
def test_what_is_wrong_is_refused_without_a_file(
    fields: dict[str, Any], error: type[NiwakiError], message: str, decoder: Decoder
) -> None:
    with pytest.raises(error, match=message):
        resolve(make_recipe(fields), decoder)


def test_the_allocation_follows_from_the_method() -> None:
    for method, target, allocation in ("squeeze10", "2bit", "sensitivity"), ("gptq", "4bit", "uniform"):
        assert resolve_allocation(recipe_of(method=method, target=target)).allocation == allocation
    assert resolve_allocation(recipe_of(method="squeeze10", target="2bit", keep_blocks="0")).allocation == "uniform"


def test_resolution_reads_no_weights_and_no_text(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def watched(path: object, *arguments: object, **options: object) -> object:
        opened.append(Path(str(path)).name)
        return original(path, *arguments, **options)  # type: ignore[call-overload]

    original = open
    monkeypatch.setattr(Path, "open", watched)
    monkeypatch.setattr("builtins.open", watched)
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a resolution reads no weights"))
    assert len(resolve(recipe_of(method="comp+rtn", target="0.3+4bit", options={"rtn.group": 0}), decoder).stages) == 2
    assert set(opened) <= {"config.json"}, "no text is touched"
