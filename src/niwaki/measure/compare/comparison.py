"""Comparison of any number of candidates with one dense model: same tokens, same questions, turns on one machine.

    comparison = niwaki.compare("MODEL", ["OUT"], data="mine.jsonl", tasks="questions.jsonl", gate="gate.yaml")
    comparison.passed, comparison.candidates[0].data[0].whole.perplexity_ratio

Quality is paired (`token_metrics`, `task_metrics`), with intervals over documents and questions (`intervals`). Speed,
memory and loading are measured in separate processes (`worker`, `speed`). `gates` judge. One record holds all results
(`schema`), and every metric has one stable name (`metrics`).

Cost: the dense model and every candidate read the data once, block by block. Then two whole models are in memory.
"""

import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from niwaki.compression.places import alone_at
from niwaki.config.events import Event, Report, silent
from niwaki.config.recipe import BosPolicy, as_files
from niwaki.data.bos import Bos, find_bos
from niwaki.data.stream import default_batch_tokens
from niwaki.data.text_amount import fit_seq_len
from niwaki.errors import InputError
from niwaki.measure.compare.dense_scores import run_dense
from niwaki.measure.compare.gates import CONFIDENCE, each_confidence, judge_comparison, load_gates
from niwaki.measure.compare.inputs import (
    check_inputs,
    command_line,
    first_prompts,
    read_prompts,
    shared_tokenizer,
    speed_prompt,
)
from niwaki.measure.compare.report_folder import check_report, read_records, report_place, write_report
from niwaki.measure.compare.scoring import EvaluationInputs, score_candidate
from niwaki.measure.compare.speed import continue_prompts, measure_speed, read_memory
from niwaki.measure.compare.task_metrics import task_quality
from niwaki.measure.compare.token_metrics import data_quality, read_text, worst_examples
from niwaki.measure.compare.worker import Worker
from niwaki.measure.description import describe_environment, describe_model, short_name
from niwaki.measure.evaluate.tasks import buckets, read_items
from niwaki.measure.report.comparison_card import put_comparison
from niwaki.measure.report.evaluation_card import check_card
from niwaki.measure.schema import Candidate, Comparison, ComparisonSettings, Model
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.decoder import Decoder
from niwaki.model.device import pick_device, pick_dtype

SEQ_LEN = 1024
ROUNDS = 9  # at 95 % the interval of the median then excludes the fastest and the slowest round; 99 % needs 8
PROMPT_TOKENS, NEW_TOKENS = 128, 32


@alone_at("report", report_place)
def compare(
    dense: str | Path,
    candidates: str | Path | Sequence[str | Path],
    *,
    data: str | Path | Sequence[str | Path] = (),
    tasks: str | Path | Sequence[str | Path] = (),
    gate: str | Path | None = None,
    report: str | Path | None = None,
    prompts: str | Path | None = None,
    seq_len: int = SEQ_LEN,
    max_tokens: int | None = None,
    limit: int | None = None,
    shots: int = 0,
    rounds: int = ROUNDS,
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    field: str = "text",
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    logit_bytes: int | None = None,
    bos: BosPolicy = "auto",
    lang: str = "en",
    overwrite: bool = False,
    update_card: bool = False,
    dense_scores: str | Path | None = None,
    progress: Report | None = None,
) -> Comparison:
    """Compare every candidate with `dense` on text files and task files, and judge it by the gates of a file.

    `report`: folder for report.html (in `lang`), compare.json and junit.xml; `overwrite` replaces an earlier one.
    `prompts`: .txt with one per line, or .jsonl with `prompt`; by default the first tokens of the data. `max_tokens`
    cuts every data file, `limit` every task file. `shots`: solved questions before each question of a task. `rounds`:
    prefills of `prompt_tokens`, each with `new_tokens` decoded after it. With 0 rounds no whole model runs: no speed,
    memory, loading time or texts. `seed`: of bootstrap and solved questions. `dense_scores`: folder that keeps those of
    the dense model for later comparisons. `logit_bytes` limits the logits made at once (256 MiB). `bos`: beginning of
    every text. `update_card` writes the results on the card of every candidate.
    Raises InputError, and writes nothing, if an input cannot be read or the models cannot be compared.
    """
    started, date = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
    gates = None if gate is None else load_gates(gate)
    place = None if report is None else check_report(Path(report), lang, overwrite=overwrite)
    sources = [str(dense), *as_files(candidates)]
    settings, tokenizer, decoders = _open_models(
        sources, device, dtype, progress or silent, data=as_files(data), tasks=as_files(tasks), prompts=prompts,
        field=field, seq_len=seq_len, max_tokens=max_tokens, limit=limit, shots=shots, rounds=rounds,
        prompt_tokens=prompt_tokens, new_tokens=new_tokens, seed=seed, logit_bytes=logit_bytes, bos=bos,
    )  # fmt: skip
    folders = [decoder.checkpoint.folder for decoder in decoders[1:]]
    cards, records = _check_cards(folders if update_card else []), [] if report is None else read_records(folders)
    confidence = CONFIDENCE if gates is None else each_confidence(gates, settings, len(folders))
    inputs = _read_inputs(settings, tokenizer, decoders, progress or silent)
    found = _Job(settings, inputs, tokenizer, confidence, dense_scores, progress or silent).run(sources, decoders)
    comparison = Comparison(
        date=date, command=command_line(sources, settings, gate=gate, report=report, lang=lang),
        seconds=round(time.perf_counter() - started, 2), confidence=confidence, settings=settings, dense=found[0],
        environment=describe_environment(decoders[0].device), candidates=found[1],
    )  # fmt: skip
    comparison = comparison if gates is None else judge_comparison(comparison, gates)
    return _publish(comparison, place, records, lang, cards)


def _open_models(
    sources: list[str], device: str, dtype: str, progress: Report, **given: Any
) -> tuple[ComparisonSettings, Any, list[Decoder]]:
    """Return the settings that fit all models, their tokenizer, and the decoders, the dense one first."""
    counts = {name: given[name] for name in ("seq_len", "max_tokens", "limit", "shots", "rounds")}
    check_inputs(sources[1:], given["data"], given["tasks"], **counts)
    place = pick_device(device)
    decoders = [
        Decoder(Checkpoint.open(source), place, pick_dtype(dtype), logit_bytes=given["logit_bytes"])
        for source in sources
    ]
    tokenizer = shared_tokenizer([decoder.checkpoint.folder for decoder in decoders])
    given["bos"] = find_bos(tokenizer, given["bos"]).state
    return _resolve_settings(decoders, given, progress), tokenizer, decoders


def _resolve_settings(decoders: list[Decoder], given: dict[str, Any], report: Report) -> ComparisonSettings:
    """Return the settings with sizes that fit all models. Raises InputError for a size that does not fit."""
    positions = _min_positions(decoders)
    if given["data"]:
        given["seq_len"] = fit_seq_len(given["seq_len"], SEQ_LEN, positions, "the models", report)
    sizes = {}
    for name, default, share in (("prompt_tokens", PROMPT_TOKENS, 2), ("new_tokens", NEW_TOKENS, 4)):
        fitting = default if positions is None else min(default, positions // share)
        sizes[name] = fitting if given[name] is None else given[name]
        if sizes[name] < 1:
            raise InputError(f"{name} must be at least 1, got {sizes[name]}")
    total = sizes["prompt_tokens"] + sizes["new_tokens"]
    if positions is not None and total > positions:
        raise InputError(
            f"prompt_tokens {sizes['prompt_tokens']} and new_tokens {sizes['new_tokens']} are {total} tokens, "
            f"the models have {positions} positions: lower --prompt-tokens or --new-tokens"
        )
    prompts, dtype = given["prompts"], str(decoders[0].dtype).removeprefix("torch.")
    paths = {"prompts": None if prompts is None else str(prompts)}
    return ComparisonSettings(**{**given, **sizes, **paths}, device=str(decoders[0].device), dtype=dtype)


def _check_cards(folders: Sequence[Path]) -> Sequence[Path]:
    """Return the folders. Raises InputError for one without a model card of niwaki."""
    for folder in folders:
        check_card(folder)
    return folders


def _publish(
    comparison: Comparison, report: Path | None, records: Sequence[Any], lang: str, cards: Sequence[Path]
) -> Comparison:
    """Write the report, and the results of every candidate on its model card, where they are asked for."""
    if report is not None:
        write_report(report, comparison, records, lang)
    for folder, candidate in zip(cards, comparison.candidates, strict=False):  # no cards, or one for each
        put_comparison(folder, comparison, candidate)
    return comparison


def _read_inputs(
    settings: ComparisonSettings, tokenizer: Any, decoders: list[Decoder], report: Report
) -> EvaluationInputs:
    positions = _min_positions(decoders)
    texts = [
        read_text(
            path, tokenizer, field=settings.field, seq_len=settings.seq_len, max_tokens=settings.max_tokens,
            bos=settings.bos, report=report,
        )
        for path in settings.data
    ]  # fmt: skip
    items = {path: read_items(path, settings.limit, settings.shots, settings.seed) for path in settings.tasks}
    batch_tokens, bos = default_batch_tokens(decoders[0].device), find_bos(tokenizer, settings.bos)
    sequences = {path: buckets(own, tokenizer, positions, batch_tokens, bos) for path, own in items.items()}
    return EvaluationInputs(texts, items, sequences)


def _min_positions(decoders: list[Decoder]) -> int | None:
    return min((d.positions for d in decoders if d.positions is not None), default=None)


@dataclass(frozen=True)
class _Job:
    """Data that all steps of a comparison share."""

    settings: ComparisonSettings
    inputs: EvaluationInputs
    tokenizer: Any
    confidence: float
    dense_scores: str | Path | None
    report: Report

    @property
    def bos(self) -> Bos:
        """Return what begins every text."""
        return find_bos(self.tokenizer, self.settings.bos)

    def run(self, sources: list[str], decoders: list[Decoder]) -> tuple[Model, tuple[Candidate, ...]]:
        """Return the dense model and the candidates. Quality is measured first, then what needs whole models."""
        prompts = read_prompts(self.settings, self.tokenizer, decoders)
        prompts = prompts or first_prompts(self.inputs, self.tokenizer, self.settings)
        models = [
            describe_model(source, short_name(source, sources), decoder, decoders[0])
            for source, decoder in zip(sources, decoders, strict=True)
        ]
        candidates = self._measure_quality(decoders, models)
        _check_unchanged(decoders)
        if not self.settings.rounds:
            return models[0], tuple(candidates)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the worker processes need it now
        folders = [decoder.checkpoint.folder for decoder in decoders]
        measured = self._measure_whole(folders, models[0], candidates, prompts)
        _check_unchanged(decoders)
        return measured

    def _measure_quality(self, decoders: list[Decoder], models: list[Model]) -> list[Candidate]:
        first_tokens = min(self.settings.prompt_tokens, self.settings.seq_len // 2)
        candidates = []
        with tempfile.TemporaryDirectory(prefix="niwaki-") as folder:
            dense, dense_answers = run_dense(
                decoders[0], self.inputs, self.bos, Path(folder) / "dense", self.dense_scores, self.report
            )
            for number, (decoder, model) in enumerate(zip(decoders[1:], models[1:], strict=True)):
                own = Path(folder) / str(number)
                scores = score_candidate(decoder, dense, self.inputs, first_tokens, own, self.report)
                decoder.release_outer()
                shutil.rmtree(own, ignore_errors=True)  # hidden states that did not fit in memory
                rng = np.random.default_rng(self.settings.seed)  # the same draws for every candidate
                candidates.append(
                    Candidate(
                        model=model,
                        scoring=scores.scoring,
                        bytes_ratio=model.file_bytes / models[0].file_bytes,
                        data=tuple(data_quality(scored, self.confidence, rng) for scored in scores.texts),
                        tasks=tuple(
                            task_quality(path, items, dense_answers[path], scores.answers[path], self.confidence, rng)
                            for path, items in self.inputs.items.items()
                        ),
                        speed=None,
                        generations=(),
                        worst=worst_examples(scores.texts, self.tokenizer),
                        gates=(),
                        passed=None,
                    )
                )
        decoders[0].release_outer()
        return candidates

    def _measure_whole(
        self, folders: list[Path], model: Model, candidates: list[Candidate], prompts: list[list[int]]
    ) -> tuple[Model, tuple[Candidate, ...]]:
        """Add speed, texts, memory and loading time, which need the whole model in a process."""
        settings = self.settings
        ids = speed_prompt(self.inputs, self.tokenizer, self.bos, settings.prompt_tokens)
        measured, done, rounds = [], 0, len(candidates) * (settings.rounds + 1)

        def after_round() -> None:
            nonlocal done
            done += 1
            self.report(Event.MEASURE, done=done, of=rounds)

        with Worker(folders[0], settings.device) as dense:
            for folder, candidate in zip(folders[1:], candidates, strict=True):
                with Worker(folder, settings.device) as own:
                    speed = measure_speed(
                        dense, own, ids, settings.new_tokens, settings.rounds, self.confidence, after_round
                    )
                    texts = continue_prompts(dense, own, prompts, settings.new_tokens, self.tokenizer)
                    changes = {"model": _with_loading(candidate.model, own), "speed": speed, "generations": texts}
                measured.append(candidate.model_copy(update=changes))
            return _with_loading(model, dense), tuple(measured)


def _check_unchanged(decoders: Sequence[Decoder]) -> None:
    """Raise CheckpointError if a model is no longer the one that was opened."""
    for decoder in decoders:
        decoder.checkpoint.log.check()


def _with_loading(model: Model, worker: Worker) -> Model:
    loading = {"load_seconds": worker.loaded["load_seconds"], "memory": read_memory(worker)}
    return model.model_copy(update=loading)


__all__ = ["compare"]
