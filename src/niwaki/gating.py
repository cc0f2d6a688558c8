"""Which prompts a contextual model should not be trusted with: chosen on the user's own text.

Every prompt has a deviation, how far what it shows lies from what the predictor expects. Prompts like those of the
calibration have a small one. Here texts are continued token by token along their own words, by the full model and by
the part that the runtime would choose, and their top-1 tokens are compared. Prompts are sorted by deviation; the gate
lies where the agreement of all, those above it running dense and so agreeing, just reaches what was asked for.

Cost: one forward of the text with the full model, and one token at a time with a part of it. The whole model in memory.

    niwaki.gating.calibrate_gate("OUT", data=["mine.txt"], agreement=0.95)
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from niwaki.calibration import check_seq_len, evaluation_windows, load_tokenizer, read_texts
from niwaki.config import as_files
from niwaki.contextual.record import has_shadow, read_shadow, write_about
from niwaki.errors import InputError
from niwaki.generation import load
from niwaki.runtime.contextual import Contextual, attach

LEAST = 1e-9  # a gate that lets nothing through; 0 would be none


def calibrate_gate(
    out: str | Path,
    *,
    data: str | Path | Sequence[str | Path],
    agreement: float = 0.9,
    samples: int = 32,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    field: str = "text",
    device: str = "auto",
) -> dict[str, Any]:
    """Writes `most_deviation` beside the predictor in `out`; returns it, and the agreement it gives on this text.

    Raises InputError for a folder without a predictor, no data, or an agreement outside (0, 1].
    """
    folder, files = Path(out), as_files(data)
    if not has_shadow(folder):
        raise InputError(f"{folder} holds no predictor: make one with `niwaki compress MODEL {folder} --method shadow`")
    if not files:
        raise InputError("nothing to calibrate on: give --data FILE")
    if not 0 < agreement <= 1 or min(samples, prompt_tokens, new_tokens) < 1:
        raise InputError("expected agreement in (0, 1], and samples, prompt_tokens and new_tokens of at least 1")
    shadow = read_shadow(folder)
    model = load(folder, device=device, dense=True)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    check_seq_len(prompt_tokens + new_tokens, 0, positions, str(folder))
    windows_ST = evaluation_windows(
        read_texts(files, field), load_tokenizer(folder), seq_len=prompt_tokens + new_tokens,
        max_tokens=samples * (prompt_tokens + new_tokens),
    )  # fmt: skip
    open_gate = replace(shadow.running, most_deviation=0.0)
    contextual = attach(model, replace(shadow, running=open_gate))
    found = [compare(contextual, ids_T[None].to(model.device), prompt_tokens) for ids_T in windows_ST]
    most_deviation, reached = choose(found, agreement)
    write_about(folder, replace(shadow, running=replace(shadow.running, most_deviation=most_deviation)))
    sparse = sum(deviation <= most_deviation for deviation, _ in found)
    return {
        "most_deviation": most_deviation,
        "prompts": len(found),
        "sparse_frac": sparse / len(found),
        "agreement": reached,
        "agreement_all_sparse": sum(agreed for _, agreed in found) / len(found),
    }


@torch.no_grad()
def compare(contextual: Contextual, ids_1T: Tensor, prompt: int) -> tuple[float, float]:
    """Deviation of a prompt, and on what share of the tokens behind it full and partial model agree.

    A prompt that the runtime answers with the full model agrees wholly, with the highest deviation.
    """
    from transformers import DynamicCache

    model = contextual.model
    contextual.enabled = False
    wanted_T = model(input_ids=ids_1T, use_cache=False).logits[0, prompt:].argmax(-1)
    contextual.enabled = True
    cache = DynamicCache(config=model.config)
    model(input_ids=ids_1T[:, :prompt], past_key_values=cache, use_cache=True)
    tokens = (ids_1T[:, place : place + 1] for place in range(prompt, ids_1T.shape[1]))
    steps = [model(input_ids=token, past_key_values=cache, use_cache=True).logits[0, -1] for token in tokens]
    record = contextual.records[-1]
    if record.dense_because:
        return float("inf"), 1.0
    return record.deviation[0], float((torch.stack(steps).argmax(-1) == wanted_T).float().mean())


def choose(found: Sequence[tuple[float, float]], agreement: float) -> tuple[float, float]:
    """The highest deviation that may run sparse so that all prompts together agree so much, and how much they do."""
    best, total = (LEAST, 1.0), 0.0
    for count, (deviation, agreed) in enumerate(sorted(found), start=1):
        total += agreed
        overall = (total + len(found) - count) / len(found)
        if overall >= agreement - 1e-9 and deviation < float("inf"):
            best = deviation, overall
    return best
