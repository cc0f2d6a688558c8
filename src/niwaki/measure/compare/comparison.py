"""Any number of candidates against one dense model: the same tokens, the same questions, turns on one machine.

    found = niwaki.compare("MODEL", ["OUT"], data="mine.jsonl", tasks="questions.jsonl", gate="gate.yaml")
    found.passed, found.candidates[0].data[0].whole.perplexity_ratio

Quality is paired (`texts`, `answers`) with intervals over documents and questions (`intervals`); speed, memory and
loading are measured in processes of their own (`worker`, `measuring`); `gates` judge. All of it is in one record
(`evidence`), and every metric has one stable name (`metrics`).

Cost: the dense model and every candidate pass the data once, block by block; then two whole models in memory.
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

from niwaki.config.events import Event, Report, silent
from niwaki.config.recipe import as_files
from niwaki.data.texts import check_seq_len
from niwaki.errors import InputError
from niwaki.measure.compare.answers import task_quality
from niwaki.measure.compare.describing import describe, environment, measured, names_of
from niwaki.measure.compare.files import check_report, read_records, write_report
from niwaki.measure.compare.gates import CONFIDENCE, each_confidence, judged, load_gates
from niwaki.measure.compare.inputs import (
    check_sources_of,
    command_of,
    first_prompts,
    read_prompts,
    same_tokenizer,
    speed_prompt,
)
from niwaki.measure.compare.measuring import measure_speed, memory_of, write_both
from niwaki.measure.compare.scoring import Material, answers_of, passed, score_candidate
from niwaki.measure.compare.token_metrics import data_quality, read_text, worst_examples
from niwaki.measure.compare.worker import Worker
from niwaki.measure.evaluate.tasks import buckets, read_items
from niwaki.measure.report.card import checked_cards, put_comparison
from niwaki.measure.schema import Candidate, Comparison, Model, Settings
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.decoder import Decoder
from niwaki.model.device import pick_device, pick_dtype

SEQ_LEN = 1024
ROUNDS = 9  # the interval of the median at 95 % then leaves out the fastest and the slowest; 99 % needs 8
PROMPT_TOKENS, NEW_TOKENS = 128, 32


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
    rounds: int = ROUNDS,
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    field: str = "text",
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    lang: str = "en",
    overwrite: bool = False,
    update_card: bool = False,
    progress: Report | None = None,
) -> Comparison:
    """Compares every candidate with `dense` on text files and task files, and judges it by the gates of a file.

    `report`: folder for report.html (in `lang`), compare.json and junit.xml; `overwrite` replaces an earlier one.
    `prompts`: .txt with one a line, or .jsonl with `prompt`; without it the first tokens of the data are continued.
    `max_tokens` cuts every data file, `limit` every task file. Speed: `rounds` of reading `prompt_tokens` and writing
    `new_tokens` (0 rounds: no model runs as a whole, and nothing of speed, memory, loading and texts is measured). The
    seed decides what the bootstrap draws.
    `update_card` writes what was measured of every candidate on its model card.

    Raises InputError for anything that cannot be read or compared; nothing is written then.
    """
    begin, begun = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
    gates = None if gate is None else load_gates(gate)
    if report is not None:
        check_report(Path(report), lang, overwrite=overwrite)
    sources = [str(dense), *as_files(candidates)]
    data, tasks = as_files(data), as_files(tasks)
    check_sources_of(sources[1:], data, tasks, seq_len=seq_len, max_tokens=max_tokens, limit=limit, rounds=rounds)
    where = pick_device(device)
    decoders = [Decoder(Checkpoint.open(source), where, pick_dtype(dtype)) for source in sources]
    folders = [decoder.checkpoint.folder for decoder in decoders[1:]]
    cards = checked_cards(folders if update_card else [])
    records = [] if report is None else read_records(folders)
    tokenizer = same_tokenizer([decoder.checkpoint.folder for decoder in decoders])
    settings = _settings(
        decoders, data=data, tasks=tasks, prompts=prompts, field=field, seq_len=seq_len, max_tokens=max_tokens,
        limit=limit, rounds=rounds, prompt_tokens=prompt_tokens, new_tokens=new_tokens, seed=seed, device=str(where),
        dtype=str(decoders[0].dtype).removeprefix("torch."),
    )  # fmt: skip
    material = _material(settings, tokenizer, decoders)
    prompt_ids = read_prompts(settings, tokenizer, decoders) or first_prompts(material, tokenizer, settings)
    models = [describe(*about, decoders[0]) for about in zip(sources, names_of(sources), decoders, strict=True)]
    confidence = CONFIDENCE if gates is None else each_confidence(gates, settings, len(folders))
    job = _Job(settings, material, tokenizer, confidence, progress or silent)
    against, found = job.run(decoders, models, prompt_ids)
    comparison = Comparison(
        date=begun, command=command_of(sources, settings, gate=gate, report=report, lang=lang),
        seconds=round(time.perf_counter() - begin, 2), confidence=confidence, settings=settings,
        environment=environment(where), dense=against, candidates=tuple(found), gate=None, passed=None,
    )  # fmt: skip
    comparison = comparison if gates is None else judged(comparison, gates)
    if report is not None:
        write_report(Path(report), comparison, records, lang)
    for folder, candidate in zip(cards, comparison.candidates, strict=False):  # no cards, or one for each
        put_comparison(folder, comparison, candidate)
    return comparison


@dataclass
class _Job:
    """What all steps of a comparison share."""

    settings: Settings
    material: Material
    tokenizer: Any
    confidence: float
    report: Report

    def run(
        self, decoders: list[Decoder], models: list[Model], prompts: list[list[int]]
    ) -> tuple[Model, list[Candidate]]:
        """Quality of all candidates, then everything that needs whole models. The dense model comes first."""
        found = self._qualities(decoders, models)
        if not self.settings.rounds:
            return models[0], found
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # other processes need it from here on
        return self._measured([decoder.checkpoint.folder for decoder in decoders], models[0], found, prompts)

    def _qualities(self, decoders: list[Decoder], models: list[Model]) -> list[Candidate]:
        first_tokens = min(self.settings.prompt_tokens, self.settings.seq_len // 2)
        found = []
        with tempfile.TemporaryDirectory(prefix="niwaki-") as folder:
            dense = passed(decoders[0], self.material, Path(folder) / "dense", self.report)
            dense_answers = answers_of(dense, self.material)
            for number, (decoder, model) in enumerate(zip(decoders[1:], models[1:], strict=True)):
                own = Path(folder) / str(number)
                scores = score_candidate(decoder, dense, self.material, first_tokens, own, self.report)
                decoder.release_outer()
                shutil.rmtree(own, ignore_errors=True)  # hidden states that found no room in memory
                rng = np.random.default_rng(self.settings.seed)  # the same draws for every candidate
                found.append(
                    Candidate(
                        model=model,
                        scoring=scores.scoring,
                        bytes_ratio=model.file_bytes / models[0].file_bytes,
                        data=tuple(data_quality(scored, self.confidence, rng) for scored in scores.texts),
                        tasks=tuple(
                            task_quality(path, items, dense_answers[path], scores.answers[path], self.confidence, rng)
                            for path, items in self.material.items.items()
                        ),
                        speed=None,
                        generations=(),
                        worst=worst_examples(scores.texts, self.tokenizer),
                        gates=(),
                        passed=None,
                    )
                )
        decoders[0].release_outer()
        return found

    def _measured(
        self, folders: list[Path], model: Model, candidates: list[Candidate], prompts: list[list[int]]
    ) -> tuple[Model, list[Candidate]]:
        settings, ids = self.settings, speed_prompt(self.material, self.tokenizer, self.settings.prompt_tokens)
        found, done, rounds = [], 0, len(candidates) * (settings.rounds + 1)

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
                    texts = write_both(dense, own, prompts, settings.new_tokens, self.tokenizer)
                    weighed = measured(candidate.model, own.loaded["load_seconds"], memory_of(own))
                changes = {"model": weighed, "speed": speed, "generations": texts}
                found.append(candidate.model_copy(update=changes))
            return measured(model, dense.loaded["load_seconds"], memory_of(dense)), found


def _settings(decoders: list[Decoder], **given: Any) -> Settings:
    """What was asked for with the sizes that fit all models. Raises where what was asked for does not fit."""
    positions = min((d.positions for d in decoders if d.positions is not None), default=None)
    for decoder in decoders:
        if given["data"]:
            check_seq_len(given["seq_len"], SEQ_LEN, decoder.positions, str(decoder.checkpoint.folder))
    for name, default, share in (("prompt_tokens", PROMPT_TOKENS, 2), ("new_tokens", NEW_TOKENS, 4)):
        if given[name] is None:
            given[name] = default if positions is None else min(default, positions // share)
        if given[name] < 1:
            raise InputError(f"{name} must be at least 1, got {given[name]}")
    total = given["prompt_tokens"] + given["new_tokens"]
    if positions is not None and total > positions:
        raise InputError(
            f"prompt_tokens {given['prompt_tokens']} and new_tokens {given['new_tokens']} are {total} tokens, "
            f"the models have {positions} positions: lower --prompt-tokens or --new-tokens"
        )
    prompts = given["prompts"]
    return Settings(**{**given, "prompts": None if prompts is None else str(prompts)})


def _material(settings: Settings, tokenizer: Any, decoders: list[Decoder]) -> Material:
    positions = min((d.positions for d in decoders if d.positions is not None), default=None)
    texts = [
        read_text(path, tokenizer, field=settings.field, seq_len=settings.seq_len, max_tokens=settings.max_tokens)
        for path in settings.data
    ]
    items = {path: read_items(path, settings.limit) for path in settings.tasks}
    return Material(texts, items, {path: buckets(own, tokenizer, positions) for path, own in items.items()})


__all__ = ["compare"]
