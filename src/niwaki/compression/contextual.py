"""The job of a contextual method: traces of the dense model, a predictor beside its weights, nothing else changed."""

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from niwaki.compression.candidates import evaluate_candidates
from niwaki.compression.job import CompressionJob
from niwaki.compression.model_card import model_card
from niwaki.compression.run import RECORD, Run
from niwaki.compression.traces import trace
from niwaki.config.events import Event, Report
from niwaki.config.recipe import Sparsity
from niwaki.data.stream import Stream
from niwaki.errors import CalibrationError, InputError
from niwaki.model.checkpoint import INDEX
from niwaki.model.files import copy_file, file_sha256, write_text
from niwaki.runtime.contextual.record import TENSORS, Running, Shadow, write_shadow
from niwaki.runtime.contextual.traces import prompt_lengths
from niwaki.runtime.contextual.units import find_layout

PART = "predictor"


class ShadowJob(CompressionJob):
    """A run that learns what inputs need; the weights of OUT are those of MODEL."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.config = self.steps[0].config
        self.layout = find_layout(self.decoder.anatomy, self.decoder.model, self.config.neuron_width)
        assert self.windows_ST is not None, "contextual methods ask for windows"
        count, tokens = self.windows_ST.shape
        if prompt_lengths(tokens, self.config.cuts)[0] < 2:
            raise CalibrationError(
                f"windows of {tokens} tokens cannot be cut into {self.config.cuts} prompts and what follows: "
                "raise --seq-len, or lower cuts"
            )
        if count < 8:
            raise InputError(f"a predictor cannot be learned from {count} windows: give --samples 8 or more")

    def _run(self, run: Run) -> dict[str, Any]:
        def report(event: str, **fields: Any) -> None:
            run.event(event, **fields)
            self.report(event, **fields)

        report(Event.START, blocks=len(self.decoder), method=self.recipe.method, target=str(self.target))
        if PART not in run.finished:
            self._learn(run, report)
        for name in self._files():
            _link(self.checkpoint.folder / name, run.folder / name)
        for source in self.checkpoint.aux_files():
            copy_file(source, run.folder / source.name)
        record = self._record(run, [run.finished[PART]])
        write_text(run.folder / "README.md", model_card(record))
        write_text(run.folder / RECORD / "blocks.jsonl", "")
        write_text(run.folder / RECORD / "run.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        report(Event.DONE, seconds=record["seconds"], out=str(self.out))
        run.complete()
        return record

    def _learn(self, run: Run, report: Report) -> None:
        """Traces the model, fits the predictor, and writes it."""
        assert isinstance(self.target, Sparsity) and self.windows_ST is not None

        def make(ids_ST: Tensor, name: str) -> Stream:
            stream = self._stream(run, name, ids_ST)
            assert stream is not None
            return stream

        traces = trace(
            self.decoder, self.windows_ST, self.layout, self.config.criteria,
            cuts=self.config.cuts, gradient_windows=self.config.gradient_windows, make_stream=make,
            activation_bytes=self.recipe.activation_bytes, folder=run.folder / RECORD / "journal", report=report,
        )  # fmt: skip
        method, weights = self.steps[0].contextual_method, self.decoder.anatomy.weights
        skip_frac = self.target.zeros_frac
        config, tried = evaluate_candidates(
            method, self.config, traces, self.layout, skip_frac, self.decoder, self.windows_ST, make, report
        )
        samples = method.samples(traces, self.layout, config)
        predictor, found = method.learn(samples, self.layout, config, weights)
        rule = method.rule(config, skip_frac)
        kept_BU = rule.select(predictor.prior_U[None], self.layout)
        found |= {
            "head_criterion": config.head_criterion,
            "criterion": config.criterion,
            "tried": tried,
            "parameters": predictor.parameters,
            "share_of_decoder": predictor.parameters / weights,
            "skipped_frac": float(self.layout.skipped_frac(kept_BU)),
        }
        shadow = Shadow(predictor, self.layout, rule, Running(**config.running))
        sha256 = write_shadow(run.folder, shadow)
        nbytes = (run.folder / TENSORS).stat().st_size
        run.finish_part(PART, {"shard": TENSORS, "sha256": sha256, "bytes": nbytes, "found": found})
        report(Event.SAVED, part=PART)

    def _files(self) -> list[str]:
        """The shards of the model, and their index if there is one."""
        index = [INDEX] if (self.checkpoint.folder / INDEX).is_file() else []
        return [*self.checkpoint.shards, *index]

    def _result(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        entry, decoder = parts[0], self.decoder
        matrices = [linear for block in decoder.anatomy.blocks for linear in block.linears.values()]
        return {
            "weights": decoder.anatomy.weights,
            "matrices": len(matrices),
            "zeros_frac": 0.0,
            "bits": 8.0 * self.checkpoint.dtype.itemsize,
            "packed": 0,
            "notes": [],
            "bytes": self.checkpoint.nbytes + entry["bytes"],
            "sha256": {
                **{shard: file_sha256(self.checkpoint.folder / shard) for shard in self.checkpoint.shards},
                entry["shard"]: entry["sha256"],
            },
            "predictor": entry["found"],
        }


def _link(source: Path, target: Path) -> None:
    """The same file under another name where the file system can, else a copy; niwaki never writes into one."""
    target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        copy_file(source, target)
