"""Texts → token windows.

Calibration, evaluation and benchmarks share one rule. The end token follows each document. The concatenated stream is
cut into windows of equal length without overlap. Calibration first shuffles the documents by the seed. Evaluation
keeps the order of the file.

Legend: S windows, T tokens per window.

    tokenizer = load_tokenizer("MODEL")
    windows_ST = calibration_windows(read_texts(["mine.jsonl"]), tokenizer, samples=64, seq_len=512, seed=0)
"""

import hashlib
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from niwaki.config.events import Event, Report, silent
from niwaki.config.recipe import Calibration
from niwaki.config.sources import check_sources
from niwaki.data.documents import first_line, read_texts
from niwaki.errors import CalibrationError
from niwaki.model.hf import auto_class, plain_loading

SAMPLE_STEPS = 32  # tokens a window grows between two reports


def windows_for(
    given: Calibration,
    model: Path,
    *,
    positions: int | None,
    vocabulary: int,
    seed: int,
    device: str,
    report: Report,
) -> tuple[Tensor, str]:
    """Return the calibration windows [S, T] and a description of their source: the files of `given`, or the model.

    Raises CalibrationError for files that cannot be text, too little text, and windows longer than `positions`.
    It is raised too if the tokenizer has ids beyond the `vocabulary` of the model.
    """
    check_sources(given.files)
    check_seq_len(given.seq_len, Calibration().seq_len, positions, "the model")
    size = {"samples": given.samples, "seq_len": given.seq_len, "seed": seed}
    if not given.files:
        return sampled_windows(model, **size, device=device, report=report), "sampled from the model"
    windows_ST = calibration_windows(read_texts(given.files, given.field), load_tokenizer(model), **size)
    if int(windows_ST.max()) >= vocabulary:
        raise CalibrationError(
            f"the tokenizer yields id {int(windows_ST.max())}, the model has {vocabulary} embeddings: "
            "the tokenizer belongs to another model"
        )
    return windows_ST, ", ".join(given.files)


def check_seq_len(seq_len: int, default: int, positions: int | None, whose: str) -> None:
    """Raise CalibrationError for windows longer than the positions of the model (None: any length)."""
    if positions is not None and seq_len > positions:
        given = "(the default) " if seq_len == default else ""
        raise CalibrationError(
            f"seq_len {seq_len} {given}is longer than the {positions} positions of {whose}: "
            f"pass --seq-len {positions} or less"
        )


def load_tokenizer(model: str | Path) -> Any:
    """Load the tokenizer of the checkpoint. Raises CalibrationError if it is missing or has no end token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CalibrationError(
            f"no usable tokenizer in {model} ({first_line(error)}): "
            "copy tokenizer.json and tokenizer_config.json beside the weights"
        ) from error
    if tokenizer.eos_token_id is None:
        raise CalibrationError(f"the tokenizer in {model} has no end token: set eos_token in its config")
    return tokenizer


def calibration_windows(texts: Sequence[str], tokenizer: Any, *, samples: int, seq_len: int, seed: int) -> Tensor:
    """Return int64 windows [S, T] of the documents, shuffled by `seed`. Raises CalibrationError for too little text."""
    order = list(range(len(texts)))
    random.Random(seed).shuffle(order)
    stream, ends = _token_stream((texts[i] for i in order), tokenizer, samples * seq_len)
    if len(stream) < samples * seq_len:
        raise CalibrationError(
            f"calibration holds {len(stream):,} tokens in {len(ends)} documents, "
            f"{samples} windows × {seq_len} need {samples * seq_len:,}: add text, or lower --samples or --seq-len"
        )
    return torch.tensor(stream, dtype=torch.int64).view(samples, seq_len)


def evaluation_windows(texts: Sequence[str], tokenizer: Any, *, seq_len: int, max_tokens: int | None = None) -> Tensor:
    """Return int64 windows [S, T] of the first `max_tokens` tokens in file order, without an incomplete last window."""
    return owned_windows(texts, tokenizer, seq_len=seq_len, max_tokens=max_tokens)[0]


def owned_windows(
    texts: Sequence[str], tokenizer: Any, *, seq_len: int, max_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the windows of `evaluation_windows`, and the document number of each token [S, T]."""
    stream, ends = _token_stream(texts, tokenizer, max_tokens)
    count = len(stream) // seq_len
    if count == 0:
        raise CalibrationError(
            f"evaluation text holds {len(stream):,} tokens, one window needs {seq_len}: add text, or lower --seq-len"
        )
    ids_ST = torch.tensor(stream[: count * seq_len], dtype=torch.int64).view(count, seq_len)
    positions = torch.arange(count * seq_len)
    return ids_ST, torch.searchsorted(torch.tensor(ends), positions, right=True).view(count, seq_len)


def sampled_windows(
    model: str | Path,
    *,
    samples: int,
    seq_len: int,
    seed: int,
    device: str,
    report: Report = silent,
) -> Tensor:
    """Sample windows [S, T] from the model itself (temperature 1), for a recipe without calibration text.

    Cost: the whole model in memory, and about `seq_len` decode steps per batch of 16 windows. The event `sample`
    reports the tokens `done`.
    """
    from transformers import AutoConfig

    report(
        Event.WARNING,
        message=f"no calibration text given: the model samples {samples * seq_len:,} tokens of its own, one at a time, "
        "which is slow (give --calibration FILE, or lower --samples and --seq-len)",
    )

    with plain_loading():
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        decoder: Any = auto_class(config).from_pretrained(model, config=config, trust_remote_code=False)
    decoder.to(device).eval()
    start = decoder.config.bos_token_id
    if start is None:
        start = decoder.config.eos_token_id
    if start is None:
        raise CalibrationError(f"{model} names no start token to sample from: give --calibration FILE")
    torch.manual_seed(seed)
    rows = []

    def written(ids_BT: Tensor, scores: Tensor, **_: object) -> Tensor:
        """Report progress and stop nothing."""
        steps = ids_BT.shape[1] - 1
        if steps % SAMPLE_STEPS == 0 or steps == seq_len:
            report(Event.SAMPLE, done=first * seq_len + steps * len(ids_BT), of=samples * seq_len)
        return torch.zeros(len(ids_BT), dtype=torch.bool, device=ids_BT.device)

    for first in range(0, samples, 16):
        prompt = torch.full((min(16, samples - first), 1), start, device=device)
        rows.append(
            decoder.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=True,
                top_k=0,
                min_new_tokens=seq_len,
                max_new_tokens=seq_len,
                pad_token_id=start,
                stopping_criteria=[written],
            )[:, 1:].cpu()
        )
    return torch.cat(rows)


def digest(windows_ST: Tensor) -> str:
    """Return the SHA-256 of the token ids, which names the calibration in run.json and guards a resume."""
    return hashlib.sha256(windows_ST.contiguous().numpy().tobytes()).hexdigest()


def _token_stream(texts: Iterable[str], tokenizer: Any, limit: int | None) -> tuple[list[int], list[int]]:
    """Return the first `limit` tokens of all texts, and for each text the position after its end token."""
    stream: list[int] = []
    ends: list[int] = []
    for text in texts:
        if limit is not None and len(stream) >= limit:
            break
        # verbose=False: documents longer than the model are cut into windows here, so no warning is due
        stream.extend(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        stream.append(tokenizer.eos_token_id)
        ends.append(len(stream))
    return (stream if limit is None else stream[:limit]), ends
