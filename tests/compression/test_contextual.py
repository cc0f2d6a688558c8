"""`niwaki compress --method shadow`: results, refusals, and the losses of candidates."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

import niwaki
from niwaki.compression.contextual import losses_after_prompt
from niwaki.data.stream import Stream
from niwaki.errors import CalibrationError, InputError, TargetError
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.decoder import Decoder
from niwaki.runtime.contextual.predictor_files import TENSORS, read_shadow
from niwaki.runtime.contextual.selection import Rule, Variant
from support.contextual import assert_repeats_and_resumes, ids_of, layout_of, masked_logits, model_of
from support.models import tiny_llama, weights_of, write_texts

TOKENS = 16
OPTIONS = {"unit": "prompt", "gradient_windows": 4, "min_prompt": 8, "features": "last", "size_frac": 0.5}


def compress(tmp_path: Path, out: str = "out", **more: Any) -> dict[str, Any]:
    model = tmp_path / "model"
    if not model.exists():
        tiny_llama(model, dtype=torch.bfloat16, num_attention_heads=8, num_key_value_heads=4)
    text = write_texts(tmp_path / "text.jsonl")
    values: dict[str, Any] = {
        "method": "shadow",
        "target": "0.5",
        "calibration": {"files": (str(text),), "samples": 12, "seq_len": 24},
        "options": OPTIONS,
        "device": "cpu",
        **more,
    }
    return niwaki.compress(model, tmp_path / out, **values)


def test_weights_stay_and_a_predictor_joins_them(tmp_path: Path) -> None:
    record = compress(tmp_path)
    before, after = weights_of(tmp_path / "model"), weights_of(tmp_path / "out")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    shadow = read_shadow(tmp_path / "out")
    found = record["result"]["predictor"]
    assert found["head_criterion"] in found["tried"]["head_criterion"] and len(found["tried"]["criterion"]) == 3
    assert found["criterion"] == min(found["tried"]["criterion"], key=lambda name: found["tried"]["criterion"][name])
    assert found["parameters"] == shadow.predictor.parameters and found["skipped_frac"] == pytest.approx(0.5)
    size = (tmp_path / "out" / TENSORS).stat().st_size
    assert record["result"]["bytes"] == record["model"]["bytes"] + size
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads(
        (tmp_path / "model/config.json").read_text()
    )
    assert "dense model" in (tmp_path / "out/README.md").read_text()


def test_the_result_writes_with_a_part_of_the_model_and_is_dense_on_demand(tmp_path: Path) -> None:
    compress(tmp_path)
    ids_BT = torch.randint(0, 4096, (1, 20), generator=torch.Generator().manual_seed(0))

    def write(model: Any) -> list[int]:
        return model.generate(ids_BT, max_new_tokens=6, do_sample=False, eos_token_id=None)[0].tolist()  # type: ignore[no-any-return]

    sparse, dense = niwaki.load(tmp_path / "out"), niwaki.load(tmp_path / "out", dense=True)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert write(dense) == write(plain)
    written = write(sparse)
    (record,) = sparse.contextual.records
    assert record.sparse_tokens == 5 and record.skipped_frac == pytest.approx([0.5])
    sparse.contextual.enabled = False
    assert write(sparse) == write(plain) and written != write(plain)
    prompt = "The import statement is here to stay and so are its many users"
    dense_text = niwaki.generate(tmp_path / "model", prompt, max_new_tokens=12)
    assert niwaki.generate(tmp_path / "out", prompt, max_new_tokens=12, verify=4) == dense_text
    assert niwaki.generate(tmp_path / "out", prompt, max_new_tokens=12) != dense_text
    with pytest.raises(InputError, match="holds no predictor"):
        niwaki.generate(tmp_path / "model", prompt, verify=4)


@pytest.mark.parametrize("criterion", ["energy", "plainact", "fisher", "grad_norm", "l2", "snip"])
@pytest.mark.parametrize("scope", ["local", "global"])
def test_every_criterion_and_scope_runs(criterion: str, scope: str, tmp_path: Path) -> None:
    options = OPTIONS | {
        "criterion": criterion,
        "head_criterion": criterion,
        "scope": scope,
        "features": "last+mean+prompt",
        "cuts": 1,
    }
    record = compress(tmp_path, options=options)
    assert record["result"]["predictor"]["skipped_frac"] == pytest.approx(0.5, abs=0.01)
    assert record["options"]["shadow"]["criterion"] == criterion


def test_same_seed_same_bytes_and_a_finished_predictor_is_kept(tmp_path: Path) -> None:
    assert_repeats_and_resumes(compress, tmp_path, walked="traces")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target": "2:4"}, TargetError, "shadow meets a share of zeros"),
        ({"method": "shadow+wanda"}, InputError, "learns what a finished model needs: run it alone"),
        ({"allocation": "owl"}, TargetError, "drop allocation owl"),
        ({"options": {"unit": "prompt", "criterion": "taste"}}, InputError, "criterion must be one of auto, energy"),
        (
            {"options": {"unit": "prompt", "features": "first"}},
            InputError,
            "features must be none, or some of last, mean, prompt",
        ),
        ({"options": {"unit": "prompt", "neuron_width": 32}}, InputError, "neuron_width 32 does not divide the 48"),
        ({"options": {"neuron_width": 32}}, InputError, "neuron_width is an option of unit prompt: leave it out"),
        ({"options": {"unit": "prompt"}}, InputError, "no room for rank 1"),
        ({"calibration": {"samples": 4, "seq_len": 24}}, InputError, "learned from 4 windows"),
        ({"calibration": {"samples": 8, "seq_len": 3}}, CalibrationError, "windows of 3 tokens"),
        ({"options": {}, "calibration": {"samples": 8, "seq_len": 7}}, CalibrationError, "windows of 7 tokens"),
        ({"options": {}, "target": "0.95"}, TargetError, "at most 0.9 of the inputs"),
        ({"options": {"unit": "layer"}}, InputError, "unit must be one of inputs, prompt"),
        ({"options": {"max_ratio": 1}}, InputError, "max_ratio must be more than 1"),
    ],
)
def test_what_cannot_be_done_is_refused(
    change: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    if "calibration" in change:
        text = write_texts(tmp_path / "text.jsonl")
        change = {"calibration": {"files": (str(text),), **change["calibration"]}}
    with pytest.raises(error, match=message):
        compress(tmp_path, **change)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


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
