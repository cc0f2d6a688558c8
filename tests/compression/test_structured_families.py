"""Structured pruning of families with other names, inner norms or no place for biases: `plan` knows what happens."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import niwaki
from niwaki.config.events import Event
from niwaki.errors import InputError, NiwakiError
from support.families import build, families
from support.models import add_tokenizer, write_texts
from support.odd_families import odd_config

CALIBRATION = {"samples": 4, "seq_len": 12}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def saved(family: str, folder: Path) -> Path:
    if (folder / family).exists():
        return folder / family
    config = families()[family].config if family in families() else odd_config(family)
    config.vocab_size = 4096  # of the tokenizer
    build(config).save_pretrained(folder / family)
    add_tokenizer(folder / family)
    return folder / family


def recipe(text: Path, method: str, target: str, **more: Any) -> dict[str, Any]:
    calibration = {"files": (str(text),), **CALIBRATION}
    return {"method": method, "target": target, "calibration": calibration, "device": "cpu", **more}


def verdict(call: Any) -> str:
    """Return the refusal of niwaki, empty if there is none; another exception ends the test."""
    try:
        call()
    except NiwakiError as error:
        return str(error)
    return ""


REFUSED = "refused"
VERDICTS = {
    ("gpt_neo", "comp"): "", ("gpt_neo", "flap"): "", ("gpt_neo", "shortgpt"): "", ("gpt_neo", "wanda_sp"): "",
    ("xglm", "comp"): "", ("xglm", "flap"): "", ("xglm", "two_ssp"): "",
    ("ctrl", "comp"): "", ("ctrl", "shortgpt"): "", ("ctrl", "wanda_sp"): "",
    ("xlstm", "comp"): REFUSED, ("xlstm", "shortgpt"): REFUSED,
    ("bitnet", "comp"): "", ("bitnet", "flap"): REFUSED, ("bitnet", "shortgpt"): "", ("bitnet", "wanda_sp"): REFUSED,
    ("bitnet", "two_ssp"): "",
    ("olmo2", "comp"): "", ("olmo2", "flap"): "", ("granite_swa", "wanda_sp"): "", ("granite_swa", "flap"): "",
    ("bert", "shortgpt"): REFUSED, ("bert", "comp"): "", ("diffllama", "shortgpt"): REFUSED,
    ("gpt2", "wanda_sp"): REFUSED, ("mixtral", "two_ssp"): REFUSED,
}  # fmt: skip


@pytest.mark.parametrize(("family", "method"), VERDICTS)
def test_plan_and_compress_say_the_same(family: str, method: str, models: Path, text: Path, tmp_path: Path) -> None:
    model, given = saved(family, models), recipe(text, method, "0.3")
    planned = verdict(lambda: niwaki.plan(model, gpu="h100", **given))
    done = verdict(lambda: niwaki.compress(model, tmp_path / "out", **given))
    assert planned == done and bool(done) == (VERDICTS[family, method] == REFUSED)
    assert (tmp_path / "out").exists() != bool(done)


def test_what_stays_is_said_in_the_plan_in_an_event_and_in_the_record(models: Path, text: Path, tmp_path: Path) -> None:
    model, given = saved("olmo2", models), recipe(text, "wanda_sp", "0.3")
    said: list[str] = []

    def report(event: str, **fields: Any) -> None:
        if event == Event.WARNING:
            said.append(fields["message"])

    record = niwaki.compress(model, tmp_path / "out", report=report, **given)
    (line,) = [message for message in said if "q_norm" in message]
    assert line.startswith("wanda_sp leaves a part as it is: ") and record["allocation"]["stays"] == [line]
    assert line in niwaki.plan(model, gpu="h100", **given)["warnings"]
    assert record["allocation"]["shape"]["heads"] == 2


def test_flap_without_place_for_biases_says_so_or_refuses(models: Path, text: Path, tmp_path: Path) -> None:
    model = saved("qwen2", models)
    record = niwaki.compress(model, tmp_path / "auto", **recipe(text, "flap", "0.2"))
    assert record["options"]["flap"] == {"compensate": True, "bias": "off"}
    assert any("leaves out the biases" in line and "mlp.down_proj" in line for line in record["allocation"]["stays"])
    off = niwaki.compress(model, tmp_path / "off", **recipe(text, "flap", "0.2", options={"bias": "off"}))
    assert "stays" not in off["allocation"]
    given = recipe(text, "flap", "0.2", options={"bias": "on"})
    planned = verdict(lambda: niwaki.plan(model, gpu="h100", **given))
    assert planned.startswith("flap cannot store its biases: no field of a config of type qwen2")
    with pytest.raises(InputError, match="flap cannot store its biases"):
        niwaki.compress(model, tmp_path / "on", **given)


def test_biases_of_flap_load_strictly_where_another_field_holds_them(models: Path, text: Path, tmp_path: Path) -> None:
    model = saved("ernie4_5", models)
    record = niwaki.compress(model, tmp_path / "out", **recipe(text, "flap", "0.2", pack="none"))
    assert record["options"]["flap"]["bias"] == "on"
    assert json.loads((tmp_path / "out/config.json").read_text())["use_bias"] is True
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    biases = {name: p for name, p in loaded.named_parameters() if name.endswith(".bias") and "layers" in name}
    assert len(biases) == 3 * 7 and any(bool(p.any()) for name, p in biases.items() if "down_proj" in name)
    ids = torch.arange(12)[None]
    ours = niwaki.load(tmp_path / "out", device="cpu").float()(ids).logits
    torch.testing.assert_close(loaded.float()(ids).logits, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["flap", "two_ssp", "comp"])
def test_a_second_method_gets_the_multiples_it_needs(method: str, models: Path, text: Path, tmp_path: Path) -> None:
    record = niwaki.compress(saved("llama", models), tmp_path / "out", **recipe(text, f"{method}+sparsegpt", "0.2+2:4"))
    shape = record["stages"][0]["allocation"]["shape"]
    kept = shape["neurons"] if isinstance(shape["neurons"], list) else [shape["neurons"]]
    assert all(count % 4 == 0 for count in kept)
