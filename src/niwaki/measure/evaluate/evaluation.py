"""Quality of one model: perplexity, divergence from a reference, multiple-choice tasks.

Both models are streamed block by block, as in a compression. So an evaluation needs the memory of one block plus the
hidden states, and its numbers equal those of a forward of the whole model.

Every window of T tokens predicts its last T−1. Perplexity is exp of the mean negative log-likelihood over all
predicted positions. KL(reference‖model) and top-1 agreement are means over the same positions.

    niwaki.evaluate("OUT", data="mine.txt", reference="MODEL", seq_len=512)

Legend: S windows, T tokens, N positions, V vocabulary.
"""

import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from niwaki.compression.bos_loss import bos_windows
from niwaki.config.events import Report, silent
from niwaki.config.recipe import BosPolicy, as_files
from niwaki.config.sources import check_sources
from niwaki.data.bos import find_bos
from niwaki.data.hidden_states import HiddenStates
from niwaki.data.stream import default_batch_tokens
from niwaki.data.text_amount import fit_seq_len
from niwaki.data.texts import EvaluationWindows, load_tokenizer, read_evaluation
from niwaki.errors import InputError
from niwaki.measure.evaluate.final_hidden_states import FinalHiddenStates
from niwaki.measure.evaluate.harness import HarnessTasks, find_tasks, run_tasks
from niwaki.measure.evaluate.tasks import Item, buckets, check_shots, read_items, score
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.decoder import Decoder
from niwaki.model.device import pick_device, pick_dtype
from niwaki.model.logits import row_pieces
from niwaki.runtime.contextual.predictor_files import has_shadow

SEQ_LEN = 1024


def evaluate(
    model: str | Path,
    *,
    data: str | Path | Sequence[str | Path] = (),
    tasks: str | Path | Sequence[str | Path] = (),
    lm_eval: str | Sequence[str] = (),
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    shots: int = 0,
    seed: int = 0,
    reference: str | Path | None = None,
    seq_len: int = SEQ_LEN,
    max_tokens: int | None = None,
    limit: int | None = None,
    field: str = "text",
    device: str = "auto",
    dtype: str = "auto",
    logit_bytes: int | None = None,
    bos: BosPolicy = "auto",
    report: Report | None = None,
) -> dict[str, Any]:
    """Measure `model` on text files, task files and tasks of lm_eval, and against `reference` if given.

    Returns a JSON-ready mapping. Per data file: `perplexity`, `tokens`, and with a reference `reference_perplexity`,
    `kl` (mean KL(reference‖model) in nats per predicted token) and `top1_agreement`. Per task file: `tasks`. `lm_eval`
    is as that package reports it, `bytes` are those of the weight files. `max_tokens` cuts every data file, `limit`
    every task. `include_path` is a folder of task files for lm_eval, `num_fewshot` its number of examples. `shots`:
    solved questions before each question of a task file, drawn by `seed`. `logit_bytes` limits the logits made at once
    (256 MiB). `bos`: the policy for the beginning of every window and question; the result says what was done.

    Raises InputError for an input that cannot be read or does not fit the model.
    """
    data, tasks = as_files(data), as_files(tasks)
    names = (lm_eval,) if isinstance(lm_eval, str) else lm_eval
    if not (data or tasks or names):
        raise InputError("nothing to evaluate: give --data FILE, --tasks FILE or --lm-eval TASKS")
    _check_counts(seq_len=(seq_len, 2), max_tokens=(max_tokens, 2), limit=(limit, 1))
    check_shots(shots, tasks)
    check_sources(data)
    harness = find_tasks(names, include_path, num_fewshot, limit)
    place, own_dtype, paths = pick_device(device), pick_dtype(dtype), [model, *([reference] if reference else [])]
    decoders = [Decoder(Checkpoint.open(path), place, own_dtype, logit_bytes=logit_bytes) for path in paths]
    if data or tasks:
        _check_not_contextual(str(model), decoders[0])
    seq_len = _check_pair(decoders, data, seq_len, report or silent)
    questions = {path: read_items(path, limit, shots, seed) for path in tasks}
    result: dict[str, Any] = {
        "model": str(model),
        "reference": None if reference is None else str(reference),
        "bytes": decoders[0].checkpoint.nbytes,
        "reference_bytes": decoders[1].checkpoint.nbytes if reference is not None else None,
        "seq_len": seq_len,
        "dtype": str(decoders[0].dtype).removeprefix("torch."),
        **_stream_all(decoders, data, questions, seq_len, max_tokens, field, bos, report or silent),
        **({"shots": shots, "seed": seed} if shots else {}),
    }
    if harness is not None:
        result["lm_eval"] = _run_harness(harness, decoders, device=device, logit_bytes=logit_bytes, bos=bos)
    return result


def _run_harness(tasks: HarnessTasks, decoders: list[Decoder], **settings: Any) -> dict[str, Any]:
    """Return what lm_eval reports of a model, and of its reference if there is one."""
    found, *others = [run_tasks(tasks, one.checkpoint, dtype=one.dtype, **settings) for one in decoders]
    _check_unchanged(decoders)
    return {**found, "reference": others[0]} if others else found


def _check_unchanged(decoders: list[Decoder]) -> None:
    """Raise CheckpointError if a model is no longer the one that was opened."""
    for decoder in decoders:
        decoder.checkpoint.log.check()


def _stream_all(
    decoders: list[Decoder],
    data: Sequence[str],
    questions: dict[str, list[Item]],
    seq_len: int,
    max_tokens: int | None,
    field: str,
    policy: BosPolicy,
    report: Report,
) -> dict[str, Any]:
    """Run all texts and questions through the blocks of one or two models, and return what is measured on them."""
    tokenizer = load_tokenizer(decoders[0].checkpoint.folder)
    bos = find_bos(tokenizer, policy)
    size: dict[str, Any] = {"seq_len": seq_len, "max_tokens": max_tokens, "bos": policy, "report": report}
    texts = {path: read_evaluation([path], field, tokenizer, **size) for path in data}
    windows = {path: text.ids_ST for path, text in texts.items()}
    positions = min((d.positions for d in decoders if d.positions is not None), default=None)
    batch_tokens = default_batch_tokens(decoders[0].device)
    sequences = {path: buckets(items, tokenizer, positions, batch_tokens, bos) for path, items in questions.items()}
    probes = bos_windows(next(iter(windows.values())), bos, positions) if windows else {}
    with tempfile.TemporaryDirectory(prefix="niwaki-") as folder:
        states = [
            FinalHiddenStates(decoder, {**windows, **probes}, sequences, Path(folder) / str(number), report)
            for number, decoder in enumerate(decoders)
        ]
        states[-1].warn_of_bos(probes, bos, report)
        found = {
            "bos": bos.state,
            "tokens": {path: ids_ST.numel() for path, ids_ST in windows.items()},
            **_about_rows(texts),
            **_compare_all(states, list(windows)),
            "tasks": {path: _score_all(states, path, own) for path, own in questions.items()},
        }
    _check_unchanged(decoders)
    return found


def _about_rows(texts: dict[str, EvaluationWindows]) -> dict[str, Any]:
    """Return the rows that were skipped and the commits of data sets by data file, each only if there are some."""
    skipped = {path: text.skipped for path, text in texts.items() if text.skipped}
    revisions = {path: text.revision for path, text in texts.items() if text.revision}
    return {name: value for name, value in (("skipped", skipped), ("revisions", revisions)) if value}


def compare_windows(
    ids_ST: Tensor, logits: Callable[[int, slice], Iterable[Tensor]], parts: Sequence[slice]
) -> dict[str, float]:
    """Return perplexity, and with a reference KL and top-1 agreement, over all windows.

    `logits(row, part)` yields those of a part of the positions of one window, [N, V]: of the model and, optionally, of
    the reference. `parts` cover the T positions of a window.
    """
    nll = reference_nll = kl = agree = 0.0
    count = 0
    compared = False
    for row, part in product(range(len(ids_ST)), parts):
        wanted_N1 = ids_ST[row, part.start + 1 : part.stop + 1, None]
        if not len(wanted_N1):
            continue  # the last position of a window predicts nothing
        own, *others = _score_part(wanted_N1, logits(row, part))
        count += len(wanted_N1)
        nll += own
        if others:
            compared = True
            reference_nll, kl, agree = (a + b for a, b in zip((reference_nll, kl, agree), others, strict=True))
    result = {"perplexity": math.exp(nll / count)}
    if compared:
        result |= {
            "reference_perplexity": math.exp(reference_nll / count),
            "kl": kl / count,
            "top1_agreement": agree / count,
        }
    return result


def _score_part(wanted_N1: Tensor, logits: Iterable[Tensor]) -> list[float]:
    """Return the summed losses of the model, and with a reference its losses, the divergence and the agreements.

    Nothing of this part stays in memory when the next one begins.
    """
    logprobs: list[Tensor] = []
    for logits_NV in logits:
        logprobs.append(logits_NV[: len(wanted_N1)].log_softmax(-1))
        del logits_NV  # before those of the reference are made
    wanted_N1 = wanted_N1.to(logprobs[0].device)
    losses = [-_total(own_NV.gather(1, wanted_N1)) for own_NV in logprobs]
    if len(losses) == 1:
        return losses
    model_NV, reference_NV = logprobs
    kl = sum(
        _total((theirs_NV - own_NV).mul_(theirs_NV.exp()))
        for theirs_NV, own_NV in zip(row_pieces(reference_NV), row_pieces(model_NV), strict=True)
    )
    return [*losses, kl, _total(reference_NV.argmax(-1) == model_NV.argmax(-1))]


def _total(values: Tensor) -> float:
    return float(values.sum(dtype=torch.float64))


def _compare_all(states: list[FinalHiddenStates], paths: list[str]) -> dict[str, Any]:
    values: dict[str, dict[str, float]] = {}
    for path in paths:
        streams = [(one, one.windows[path]) for one in states]

        def logits(
            row: int, part: slice, streams: list[tuple[FinalHiddenStates, HiddenStates]] = streams
        ) -> Iterable[Tensor]:
            return (one.logits(stream, row, part) for one, stream in streams)

        parts = max((one.window_parts(stream) for one, stream in streams), key=len)  # the wider vocabulary decides
        for name, value in compare_windows(streams[0][1].ids_ST, logits, parts).items():
            values.setdefault(name, {})[path] = value
    return values


def _score_all(states: list[FinalHiddenStates], path: str, questions: list[Item]) -> dict[str, Any]:
    scores = [score(questions, one.buckets[path], one.logprobs) for one in states]
    return scores[0] if len(scores) == 1 else {**scores[0], "reference": scores[1]}


def _check_not_contextual(model: str, decoder: Decoder) -> None:
    """Raise InputError for a contextual model: streamed, it would run with all of its weights."""
    if has_shadow(decoder.checkpoint.folder):
        raise InputError(
            f"{model} skips weights by input, and this evaluation would run all of them: `niwaki compare DENSE {model} "
            "--data FILE` scores it as it runs, and so does --lm-eval alone"
        )


def _check_pair(decoders: list[Decoder], data: Sequence[str], seq_len: int, report: Report) -> int:
    """Return the length of windows that fits the models. Raises InputError if the models cannot be compared."""
    vocabularies = {d.checkpoint.config.get_text_config().vocab_size for d in decoders}
    if len(vocabularies) > 1:
        raise InputError(f"model and reference have different vocabularies ({vocabularies}): they cannot be compared")
    for one in decoders if data else ():
        seq_len = fit_seq_len(seq_len, SEQ_LEN, one.positions, str(one.checkpoint.folder), report)
    return seq_len


def _check_counts(**counts: tuple[int | None, int]) -> None:
    for name, (value, min_value) in counts.items():
        if value is not None and value < min_value:
            raise InputError(f"{name} must be at least {min_value}, got {value}")


__all__ = ["evaluate"]
