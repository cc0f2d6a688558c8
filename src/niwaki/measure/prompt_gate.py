"""Which prompts a contextual model should not be trusted with: chosen on the user's own text.

Every prompt has a deviation, how far what it shows lies from what the predictor expects, and a margin, how much of what
is predicted to matter its mask holds. Prompts like those of the calibration have a small one and a large one. Here
texts are continued token by token along their own words, by the full model and by the part that the runtime would
choose, and their top-1 tokens are compared. The gate is the pair of limits that lets most prompts run sparse while the
agreement of all, those beyond it running dense and so agreeing, reaches what was asked for.

On request the machine is measured too: a step with all weights, one with a part, and what the choice costs give the
share of the weights from which a batch had better run dense.

Cost: one forward of the text with the full model, and one token at a time with a part of it. The whole model in memory.

    niwaki.measure.prompt_gate.calibrate_gate("OUT", data=["mine.txt"], agreement=0.95)
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from niwaki.config.recipe import as_files
from niwaki.data.texts import check_seq_len, evaluation_windows, load_tokenizer, read_texts
from niwaki.errors import InputError
from niwaki.runtime.contextual.record import has_shadow, read_shadow, write_about
from niwaki.runtime.contextual.sparsity import Contextual, attach
from niwaki.runtime.load import load

LEAST = 1e-9  # a gate that lets nothing through; 0 would be none
STEPS = 12  # timed tokens, of which the first makes the choice


def calibrate_gate(
    out: str | Path,
    *,
    data: str | Path | Sequence[str | Path],
    agreement: float = 0.9,
    samples: int = 32,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    field: str = "text",
    batch: int = 0,
    device: str = "auto",
) -> dict[str, Any]:
    """Writes the limits beside the predictor in `out`; returns them, and the agreement they give on this text.

    With `batch` the break-even `max_kept_frac` is measured on this machine with so many sequences, and written too.

    Raises InputError for a folder without a predictor, no data, or an agreement outside (0, 1].
    """
    folder, files = Path(out), as_files(data)
    if not has_shadow(folder):
        raise InputError(f"{folder} holds no predictor: make one with `niwaki compress MODEL {folder} --method shadow`")
    if not files:
        raise InputError("nothing to calibrate on: give --data FILE")
    if not 0 < agreement <= 1 or min(samples, prompt_tokens) < 1 or new_tokens < 3 or batch < 0:
        raise InputError("expected agreement in (0, 1], samples and prompt_tokens ≥ 1, new_tokens ≥ 3, batch ≥ 0")
    shadow = read_shadow(folder)
    model = load(folder, device=device, dense=True)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    check_seq_len(prompt_tokens + new_tokens, 0, positions, str(folder))
    windows_ST = evaluation_windows(
        read_texts(files, field), load_tokenizer(folder), seq_len=prompt_tokens + new_tokens,
        max_tokens=samples * (prompt_tokens + new_tokens),
    )  # fmt: skip
    open_gate = replace(shadow.running, max_deviation=0.0, min_margin=0.0)
    contextual = attach(model, replace(shadow, running=open_gate))
    found = [compare(contextual, ids_T[None].to(model.device), prompt_tokens) for ids_T in windows_ST]
    gate, sparse, reached = choose(found, agreement)
    limits: dict[str, Any] = {**gate}
    if batch:
        timed = break_even(contextual, windows_ST[:1].expand(batch, -1).to(model.device), prompt_tokens)
        limits["max_kept_frac"] = timed["max_kept_frac"]
    write_about(folder, replace(shadow, running=replace(shadow.running, **limits)))
    return {
        **limits,
        **({"seconds": timed} if batch else {}),
        "prompts": len(found),
        "sparse_frac": sparse / len(found),
        "agreement": reached,
        "agreement_all_sparse": sum(agreed for *_, agreed in found) / len(found),
    }


@torch.no_grad()
def compare(contextual: Contextual, ids_1T: Tensor, prompt: int) -> tuple[float, float, float]:
    """Deviation and margin of a prompt, and on what share of the tokens behind it full and partial model agree.

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
        return float("inf"), 0.0, 1.0
    return record.deviation[0], record.margin[0], float((torch.stack(steps).argmax(-1) == wanted_T).float().mean())


def choose(found: Sequence[tuple[float, float, float]], agreement: float) -> tuple[dict[str, float], int, float]:
    """Limits for (deviation, margin, agreement) of prompts, how many run sparse within them, and how much all agree.

    A limit on the margin is set only where more prompts run sparse than without one.
    """
    best, most, reached = {"max_deviation": LEAST, "min_margin": 0.0}, 0, 1.0
    for min_margin in (0.0, *sorted({margin for _, margin, _ in found})):
        total = 0.0
        passing = sorted((deviation, agreed) for deviation, margin, agreed in found if margin >= min_margin)
        for count, (deviation, agreed) in enumerate(passing, start=1):
            total += agreed
            overall = (total + len(found) - count) / len(found)
            if overall >= agreement - 1e-9 and deviation < float("inf") and count > most:
                best, most, reached = {"max_deviation": deviation, "min_margin": min_margin}, count, overall
    return best, most, reached


@torch.no_grad()
def break_even(contextual: Contextual, ids_BT: Tensor, prompt: int) -> dict[str, float]:
    """Seconds of a step with all weights and with a part, of the choice, and the share of the weights where they meet.

    A step with a share f of the weights takes dense − slope·(1 − f). Over the tokens behind the prompt that has to make
    up for the choice, which is made once.
    """
    from transformers import DynamicCache

    shadow, tokens = contextual.shadow, ids_BT.shape[1] - prompt
    running = replace(shadow.running, max_kept_frac=1.0, batch="shared", max_deviation=0.0, min_margin=0.0)
    contextual.shadow = replace(shadow, running=running)
    found: dict[str, float] = {}
    for enabled in (False, True, False, True):  # the first of each warms up
        contextual.enabled = enabled
        cache, seconds = DynamicCache(config=contextual.model.config), []
        for place in range(prompt - 1, min(prompt + STEPS, ids_BT.shape[1])):
            piece_BT = ids_BT[:, :prompt] if place < prompt else ids_BT[:, place : place + 1]
            started = time.perf_counter()
            contextual.model(input_ids=piece_BT, past_key_values=cache, use_cache=True)
            if ids_BT.is_cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        found["part" if enabled else "dense"] = statistics.median(seconds[2:])
    found["choice"] = max(seconds[1] - found["part"], 0.0)  # made before the first token
    contextual.shadow, record = shadow, contextual.records[-1]
    if record.dense_because:
        raise InputError(f"nothing is skipped on this text ({record.dense_because}), so there is nothing to time")
    slope = (found["dense"] - found["part"]) / record.skipped_frac[0]
    found["max_kept_frac"] = max(1 - found["choice"] / (slope * tokens), 0.0) if slope > 0 else 0.0
    return found
