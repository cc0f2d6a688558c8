"""Widths by damage: each damage against a plain model pruned in one unit, and the shape that follows."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import niwaki
from niwaki.compression.unit_damage import probes, spread_by_damage
from niwaki.data.documents import read_texts
from niwaki.data.texts import calibration_windows, load_tokenizer
from niwaki.methods.shared.column_sweep import inverse
from niwaki.methods.shared.unit_pruning import remove_groups
from niwaki.model.anatomy import discover
from niwaki.model.hf import build_skeleton
from niwaki.model.prunable import PrunedShape, ShapeSpace
from support.families import GQA, build, families
from support.models import add_tokenizer

SAMPLES, TOKENS = 16, 32
CONSUMERS = {"neurons": "mlp.down_proj", "heads": "self_attn.o_proj"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(f"A tree of {n} years has {n * n} leaves, and {n + 3} roots." for n in range(400)))
    return path


def space(blocks: int = 4) -> ShapeSpace:
    config = transformers.LlamaConfig(**{**GQA, "num_hidden_layers": blocks})
    skeleton = build_skeleton(config, torch.float32)
    return ShapeSpace(discover(skeleton), skeleton, config.to_dict())


def saved(folder: Path) -> Path:
    config = families()["llama"].config
    config.vocab_size = 4096  # of the tokenizer
    build(config).save_pretrained(folder)
    add_tokenizer(folder)
    return folder


def loss_without(model: Any, windows: torch.Tensor, held: int, place: tuple[int, str], kept: int, sizes: Any) -> float:
    """Return the held-out loss of the plain model after the surgeon pruned one unit of it."""
    block, kind = place
    linear = model.model.layers[block].get_submodule(CONSUMERS[kind])
    met: list[torch.Tensor] = []
    hook = linear.register_forward_pre_hook(lambda module, args: met.append(args[0].flatten(0, 1)))
    dense = linear.weight.detach().clone()
    with torch.no_grad():
        model(windows[:-held])
        hook.remove()
        inverse_II, _ = inverse(met[0].T @ met[0], 0.01)
        _, pruned = remove_groups(dense, inverse_II, sizes.units[kind], kept, 1)
        linear.weight.copy_(pruned)
        logits = model(windows[-held:]).logits[:, :-1].double()
        linear.weight.copy_(dense)
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[-held:, 1:].flatten()))


def test_a_damage_is_the_rise_of_the_loss_of_a_plain_model_pruned_in_one_unit(text: Path, tmp_path: Path) -> None:
    source = saved(tmp_path / "model")
    record = niwaki.compress(
        source, tmp_path / "out", method="comp", target="0.3", allocation="damage", device="cpu", dtype="float32",
        options={"multiple": 4, "try_blocks": 0, "try_heads": 0, "at_once": 1},
        calibration={"files": (str(text),), "samples": SAMPLES, "seq_len": TOKENS},
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    sizes = ShapeSpace(discover(model), model, model.config.to_dict())
    tokenizer = load_tokenizer(source)
    windows = calibration_windows(read_texts([str(text)]), tokenizer, samples=SAMPLES, seq_len=TOKENS, seed=0)
    start = record["allocation"]["trials"][0]
    even = sizes.shape(start["neurons"], start["heads"])
    held = SAMPLES // 4
    logits = model(windows[-held:]).logits[:, :-1].double()
    dense = float(torch.nn.functional.cross_entropy(logits.detach().flatten(0, 1), windows[-held:, 1:].flatten()))
    found = {(line["block"], line["kind"]): line["rise"] for line in record["allocation"]["damages"]}
    kept = probes(sizes, even)
    assert found.keys() == kept.keys() and {kind for _, kind in kept} == {"neurons", "heads"}
    for place, rise in found.items():
        wanted = loss_without(model, windows, held, place, kept[place], sizes) - dense
        assert rise == pytest.approx(wanted, abs=2e-5), place
    assert max(found.values()) > 1e-4  # far above the tolerance


def test_units_that_do_less_damage_end_narrower() -> None:
    sizes = space()
    start = sizes.fitting(0.3, sizes.heads, (), 1)
    assert start is not None
    kept = probes(sizes, start)
    rises = {place: (4.0 if place[0] < 2 else 1.0) * (1.0 if place[1] == "neurons" else 9.0) for place in kept}
    search = spread_by_damage(sizes, start, rises, 0.3, 1)
    shapes = next(search)
    assert shapes[0] == start and all(sizes.removed_frac(shape) >= 0.3 - 1e-9 for shape in shapes)
    with pytest.raises(StopIteration) as stop:
        search.send([1.0] + [0.5 - 0.1 * number for number in range(len(shapes) - 1)])
    shape: PrunedShape = stop.value.value
    assert shape == shapes[-1] and min(shape.neurons[:2]) > max(shape.neurons[2:])
    search = spread_by_damage(sizes, start, rises, 0.3, 1)
    with pytest.raises(StopIteration) as stop:
        next(search)
        search.send([0.0] + [1.0] * (len(shapes) - 1))
    assert stop.value.value == start  # nothing on the way was better


def test_a_probe_takes_what_the_even_shape_takes_or_one_step() -> None:
    sizes = space(2)
    start = sizes.shape(sizes.neurons - 8, sizes.heads)
    assert probes(sizes, start) == {
        (0, "neurons"): sizes.neurons - 8, (0, "heads"): sizes.heads - 1,
        (1, "neurons"): sizes.neurons - 8, (1, "heads"): sizes.heads - 1,
    }  # fmt: skip
