"""Calibration of the prompt gate of a contextual model on the user's text: limits beyond which a prompt runs dense.

Every prompt has a deviation and a margin. The deviation is the distance of its activations from those that the
predictor expects. Of thresholds, it is that of its shares of small inputs from the expected ones. The margin is the
share of the predicted importance that its mask holds; thresholds have none. Prompts like those of the calibration have
a small deviation and a large margin.

The full model and the selected part of it read the same texts token by token, and their top-1 tokens are compared.
Prompts beyond the limits run dense, so they agree. The gate is the pair of limits with the most sparse prompts at which
the overall agreement reaches the wanted one.

On request this machine is timed too: a dense step, a sparse step and the selection. They give the share of kept weights
above which a batch runs faster dense.

Cost: one forward of the text with the full model, then one token at a time with a part of it. The whole model is in
memory.

    niwaki.measure.prompt_gate.calibrate_gate("OUT", data=["mine.txt"], agreement=0.95)

Legend: B sequences, S windows, T tokens.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from niwaki.compression.verify import replace_files
from niwaki.config.events import Report, silent
from niwaki.config.recipe import BosPolicy, as_files
from niwaki.data.bos import find_bos
from niwaki.data.text_amount import fit_seq_len
from niwaki.data.texts import load_tokenizer, read_evaluation
from niwaki.errors import InputError
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.logits import FinalStates, position_slices, vocabulary_of
from niwaki.runtime.contextual.attach import attach
from niwaki.runtime.contextual.decoding import ReadText
from niwaki.runtime.contextual.predictor_files import InputShadow, has_shadow, read_shadow, write_about
from niwaki.runtime.contextual.sparsity import Contextual
from niwaki.runtime.load import load_checkpoint

CLOSED = 1e-9  # a max_deviation that lets no prompt run sparse; 0 means no limit
TIMED_STEPS = 12  # the first of them includes the selection


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
    bos: BosPolicy = "auto",
    report: Report | None = None,
) -> dict[str, Any]:
    """Write the limits into the record of the predictor in `out`; return them with their agreement on this text.

    With `batch` sequences, the break-even `max_kept_frac` is measured on this machine and written too. `bos`:
    beginning-of-text token of every prompt, which counts in `prompt_tokens`.

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
    if isinstance(shadow, InputShadow) and batch:
        raise InputError(f"{folder} skips inputs, which no batch shares, so nothing can be timed: leave batch out")
    checkpoint = Checkpoint.open(folder)
    model = load_checkpoint(checkpoint, device=device, dense=True, hashed=True)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    fit_seq_len(prompt_tokens + new_tokens, 0, positions, str(folder))
    tokenizer = load_tokenizer(folder)
    size: dict[str, Any] = {"seq_len": prompt_tokens + new_tokens, "max_tokens": samples * (prompt_tokens + new_tokens)}
    windows_ST = read_evaluation(files, field, tokenizer, **size, bos=bos, report=report or silent).ids_ST
    open_gate = replace(shadow.running, max_deviation=0.0, min_margin=0.0)
    contextual = attach(model, replace(shadow, running=open_gate))
    prompts = [compare_prompt(contextual, ids_T[None].to(model.device), prompt_tokens) for ids_T in windows_ST]
    gate, sparse, reached = choose_limits(prompts, agreement)
    limits: dict[str, Any] = {**gate}
    if batch:
        seconds = measure_break_even(contextual, windows_ST[:1].expand(batch, -1).to(model.device), prompt_tokens)
        limits["max_kept_frac"] = seconds["max_kept_frac"]
    checkpoint.log.check()
    gated = replace(shadow, running=replace(shadow.running, **limits))
    replace_files(folder, lambda place: write_about(place, gated))
    return {
        **limits,
        **({"seconds": seconds} if batch else {}),
        "bos": find_bos(tokenizer, bos).state,
        "prompts": len(prompts),
        "sparse_frac": sparse / len(prompts),
        "agreement": reached,
        "agreement_all_sparse": sum(agreed for *_, agreed in prompts) / len(prompts),
    }


@torch.no_grad()
def compare_prompt(contextual: Contextual, ids_1T: Tensor, prompt: int) -> tuple[float, float, float]:
    """Return deviation and margin of a prompt, and the share of later tokens on which dense and sparse agree.

    A prompt that the runtime runs dense has infinite deviation, margin 0 and agreement 1.
    """
    from transformers import DynamicCache

    model = contextual.model
    contextual.enabled = False
    states = FinalStates(model)
    read = ReadText(contextual, states, ids_1T, states.run(ids_1T, use_cache=False))
    parts = position_slices(ids_1T.numel(), vocabulary_of(model))
    wanted_T = torch.cat([read.logits(part).argmax(-1) for part in parts])[prompt:]
    contextual.enabled = True
    cache = DynamicCache(config=model.config)
    model(input_ids=ids_1T[:, :prompt], past_key_values=cache, use_cache=True, logits_to_keep=1)
    tokens = (ids_1T[:, place : place + 1] for place in range(prompt, ids_1T.shape[1]))
    steps = [model(input_ids=token, past_key_values=cache, use_cache=True).logits[0, -1].argmax() for token in tokens]
    record = contextual.records[-1]
    if record.dense_because:
        return float("inf"), 0.0, 1.0
    margin = record.margin[0] if record.margin else 1.0  # thresholds have none
    return record.deviation[0], margin, float((torch.stack(steps) == wanted_T).float().mean())


def choose_limits(
    prompts: Sequence[tuple[float, float, float]], agreement: float
) -> tuple[dict[str, float], int, float]:
    """Return the limits for prompts of (deviation, margin, agreement), the number of sparse ones, and the agreement.

    A limit on the margin is set only if more prompts run sparse than without it.
    """
    best, max_sparse, reached = {"max_deviation": CLOSED, "min_margin": 0.0}, 0, 1.0
    for min_margin in (0.0, *sorted({margin for _, margin, _ in prompts})):
        total = 0.0
        passing = sorted((deviation, agreed) for deviation, margin, agreed in prompts if margin >= min_margin)
        for count, (deviation, agreed) in enumerate(passing, start=1):
            total += agreed
            overall = (total + len(prompts) - count) / len(prompts)
            if overall >= agreement - 1e-9 and deviation < float("inf") and count > max_sparse:
                best, max_sparse, reached = {"max_deviation": deviation, "min_margin": min_margin}, count, overall
    return best, max_sparse, reached


@torch.no_grad()
def measure_break_even(contextual: Contextual, ids_BT: Tensor, prompt: int) -> dict[str, float]:
    """Return the seconds of a dense step, of a sparse step and of the selection, and the break-even `max_kept_frac`.

    A step with a share f of the weights takes dense − slope·(1 − f). At break-even, the tokens after the prompt save
    the seconds of the one selection. Raises InputError if the model skips no weights on this text.
    """
    from transformers import DynamicCache

    shadow, tokens = contextual.shadow, ids_BT.shape[1] - prompt
    running = replace(shadow.running, max_kept_frac=1.0, batch="shared", max_deviation=0.0, min_margin=0.0)
    contextual.shadow = replace(shadow, running=running)
    times: dict[str, float] = {}
    for enabled in (False, True, False, True):  # the first of each is a warm-up
        contextual.enabled = enabled
        cache, seconds = DynamicCache(config=contextual.model.config), []
        for place in range(prompt - 1, min(prompt + TIMED_STEPS, ids_BT.shape[1])):
            chunk_BT = ids_BT[:, :prompt] if place < prompt else ids_BT[:, place : place + 1]
            started = time.perf_counter()
            contextual.model(input_ids=chunk_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
            if ids_BT.is_cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        times["part" if enabled else "dense"] = statistics.median(seconds[2:])
    times["choice"] = max(seconds[1] - times["part"], 0.0)  # the selection is part of the first step
    contextual.shadow, record = shadow, contextual.records[-1]
    if record.dense_because:
        raise InputError(
            f"the model skips no weights on this text ({record.dense_because}), so there is nothing to time"
        )
    slope = (times["dense"] - times["part"]) / record.skipped_frac[0]
    times["max_kept_frac"] = max(1 - times["choice"] / (slope * tokens), 0.0) if slope > 0 else 0.0
    return times
