"""What a model is worth: perplexity, distance to a reference, multiple-choice tasks.

Both models are streamed block by block like a compression, so evaluating needs the memory of one block plus
the hidden states, and the numbers equal those of the whole model's own forward.

    niwaki.evaluate("OUT", data="mine.txt", reference="MODEL", seq_len=512)
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from niwaki.config.events import Report, silent
from niwaki.config.recipe import as_files
from niwaki.config.sources import check_sources
from niwaki.data.stream import Stream
from niwaki.data.texts import check_seq_len, evaluation_windows, load_tokenizer, read_texts
from niwaki.errors import InputError
from niwaki.measure.evaluate.divergence import compare_windows
from niwaki.measure.evaluate.final_hidden_states import FinalHiddenStates
from niwaki.measure.evaluate.harness import find_tasks, run_tasks
from niwaki.measure.evaluate.tasks import buckets, read_items, score
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.decoder import Decoder
from niwaki.model.device import pick_device, pick_dtype
from niwaki.runtime.contextual.record import has_shadow

SEQ_LEN = 1024


def evaluate(
    model: str | Path,
    *,
    data: str | Path | Sequence[str | Path] = (),
    tasks: str | Path | Sequence[str | Path] = (),
    lm_eval: str | Sequence[str] = (),
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    reference: str | Path | None = None,
    seq_len: int = SEQ_LEN,
    max_tokens: int | None = None,
    limit: int | None = None,
    field: str = "text",
    device: str = "auto",
    dtype: str = "auto",
    report: Report | None = None,
) -> dict[str, Any]:
    """Measures `model` on text files, task files and tasks that lm_eval knows, and against `reference` if given.

    Returns a JSON-ready mapping: `perplexity`, `tokens`, and with a reference `reference_perplexity`, `kl`
    (mean KL(reference‖model) in nats per predicted token) and `top1_agreement`, each per data file; `tasks`
    per task file; `lm_eval` as that package reports it; `bytes` of the weight files. `max_tokens` cuts every data file,
    `limit` every task. `include_path` is a folder of task files for lm_eval, `num_fewshot` its number of examples.

    Raises InputError for anything that cannot be read or does not fit the model.
    """
    data, tasks = as_files(data), as_files(tasks)
    names = (lm_eval,) if isinstance(lm_eval, str) else lm_eval
    if not (data or tasks or names):
        raise InputError("nothing to evaluate: give --data FILE, --tasks FILE or --lm-eval TASKS")
    _check_counts(seq_len=(seq_len, 2), max_tokens=(max_tokens, 2), limit=(limit, 1))
    check_sources(data)
    harness = find_tasks(names, include_path, num_fewshot, limit)
    report = report or silent
    decoders = [
        Decoder(Checkpoint.open(path), pick_device(device), pick_dtype(dtype))
        for path in (model, reference)
        if path is not None
    ]
    if data or tasks:
        _check_whole(str(model), decoders[0])
    tokenizer = load_tokenizer(decoders[0].checkpoint.folder)
    _check_pair(decoders, seq_len if data else 0)
    windows = {
        path: evaluation_windows(read_texts([path], field), tokenizer, seq_len=seq_len, max_tokens=max_tokens)
        for path in data
    }
    positions = min((d.positions for d in decoders if d.positions is not None), default=None)
    questions = {path: read_items(path, limit) for path in tasks}
    packed = {path: buckets(items, tokenizer, positions) for path, items in questions.items()}
    with tempfile.TemporaryDirectory(prefix="niwaki-") as folder:
        passed = [
            FinalHiddenStates(decoder, windows, packed, Path(folder) / str(number), report)
            for number, decoder in enumerate(decoders)
        ]
        result: dict[str, Any] = {
            "model": str(model),
            "reference": None if reference is None else str(reference),
            "bytes": decoders[0].checkpoint.nbytes,
            "reference_bytes": decoders[1].checkpoint.nbytes if reference is not None else None,
            "seq_len": seq_len,
            "dtype": str(decoders[0].dtype).removeprefix("torch."),
            "tokens": {path: ids_ST.numel() for path, ids_ST in windows.items()},
            **_compare_all(passed, list(windows)),
        }
        result["tasks"] = {path: _score_all(passed, path, questions[path]) for path in tasks}
    if harness is not None:
        found = [run_tasks(harness, d.checkpoint.folder, device=device, dtype=d.dtype) for d in decoders]
        result["lm_eval"] = found[0] if reference is None else {**found[0], "reference": found[1]}
    return result


def _compare_all(passed: list[FinalHiddenStates], paths: list[str]) -> dict[str, Any]:
    found: dict[str, dict[str, float]] = {}
    for path in paths:
        streams = [(one, one.windows[path]) for one in passed]

        def logits(row: int, streams: list[tuple[FinalHiddenStates, Stream]] = streams) -> list[Tensor]:
            return [one.logits(stream, slice(row, row + 1))[0] for one, stream in streams]

        for name, value in compare_windows(streams[0][1].ids_ST, logits).items():
            found.setdefault(name, {})[path] = value
    return found


def _score_all(passed: list[FinalHiddenStates], path: str, questions: list[Any]) -> dict[str, Any]:
    scores = []
    for one in passed:

        def logits(stream: Stream, rows: slice, one: FinalHiddenStates = one) -> Tensor:
            return one.logits(stream, rows)

        scores.append(score(questions, one.buckets[path], logits))
    return scores[0] if len(scores) == 1 else {**scores[0], "reference": scores[1]}


def _check_whole(model: str, decoder: Decoder) -> None:
    """Raises InputError for a model that runs in parts: whole, it would be scored as what it is not."""
    if has_shadow(decoder.checkpoint.folder):
        raise InputError(
            f"{model} skips by input, and here all of its weights would be scored: `niwaki compare DENSE {model} "
            "--data FILE` scores it as it writes, and so does --lm-eval alone"
        )


def _check_pair(decoders: list[Decoder], seq_len: int) -> None:
    """Refuses models that cannot be compared, and windows longer than either was built for."""
    vocabularies = {d.checkpoint.config.get_text_config().vocab_size for d in decoders}
    if len(vocabularies) > 1:
        raise InputError(f"model and reference have different vocabularies ({vocabularies}): they cannot be compared")
    for decoder in decoders:
        check_seq_len(seq_len, SEQ_LEN, decoder.positions, str(decoder.checkpoint.folder))


def _check_counts(**counts: tuple[int | None, int]) -> None:
    for name, (value, least) in counts.items():
        if value is not None and value < least:
            raise InputError(f"{name} must be at least {least}, got {value}")


__all__ = ["evaluate"]
