"""What a model card tells strangers: how to make the result again, not where its maker's files lie."""

from pathlib import Path

import pytest

import niwaki
from support.models import tiny_llama, write_texts


@pytest.mark.parametrize("program", ["/somewhere/private/bin/niwaki", "/somewhere/private/script.py"])
def test_the_card_names_no_folder_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    model, text = tiny_llama(tmp_path / "model"), write_texts(tmp_path / "text.jsonl")
    out = tmp_path / "out"
    arguments = ["compress", str(model), str(out), f"--calibration={text}", "--recipe", "org/name"]
    monkeypatch.setattr("sys.argv", [program, *arguments])
    niwaki.compress(
        model,
        out,
        method="wanda",
        target="0.5",
        device="cpu",
        calibration={"files": str(text), "samples": 4, "seq_len": 16},
    )
    card = (out / "README.md").read_text()
    assert str(tmp_path) not in card and "private" not in card
    if program.endswith("niwaki"):
        assert "    niwaki compress model out --calibration=text.jsonl --recipe org/name\n" in card
    else:
        assert "      - text.jsonl\n" in card and "    method: wanda\n" in card


@pytest.mark.parametrize(("pack", "bits", "says"), [("auto", 5.0, "import niwaki"), ("none", 32.0, "stored in place")])
def test_the_card_tells_true_bits_and_how_to_load_codes(pack: str, bits: float, says: str, tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", num_key_value_heads=4, intermediate_size=64, num_attention_heads=4)
    record = niwaki.compress(
        model, tmp_path / "out", method="rtn", target="4bit", pack=pack, device="cpu",
        options={"group": 16, "symmetric": True},
    )  # fmt: skip
    card = (tmp_path / "out/README.md").read_text()
    assert record["result"]["bits"] == bits and f"| {bits:.3f} |" in card and says in card
    assert ("quantized" in card) == (pack == "auto")
    assert "measured zeros" not in card, "a code that is 0 is no pruning"
