"""The job behind `niwaki.compress`: the walk between a checkpoint and a run folder.

Everything that can be wrong with the input is checked before the first file is written.
"""

import json
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from niwaki.compression.allocation import ALLOCATIONS, OWL_NEEDS, Targets, outlier_share, owl, uniform
from niwaki.compression.bit_allocation import (
    KEPT_BITS,
    bits_within,
    choose_kept,
    kept_targets,
    rest_bits,
    sensitivities,
    sensitivity,
    spread_bits,
)
from niwaki.compression.chain import FirstStage, split_options, told_of_both
from niwaki.compression.embeddings import embeddings_to_pack, read_packed
from niwaki.compression.gradients import squared_gradients
from niwaki.compression.model_card import model_card
from niwaki.compression.plan.planner import check_possible
from niwaki.compression.resolve import resolve_allocation
from niwaki.compression.run import (
    RECORD,
    Run,
    Writer,
    check_apart,
    check_free,
    fingerprint,
    finished_record,
    partial_of,
    provenance,
)
from niwaki.compression.run_record import block_lines, packed_modules, read_plain, result_of, shard_index
from niwaki.compression.walk import Plan, collect, compress_blocks, forward
from niwaki.config.events import Event, Report
from niwaki.config.recipe import Bits, Recipe, Target, parse_target
from niwaki.data.stream import Stream, default_batch_tokens
from niwaki.data.texts import digest, windows_for
from niwaki.errors import InputError, NumericalError, unknown
from niwaki.formats.quantized import WEIGHT
from niwaki.methods.method import MethodKind
from niwaki.methods.registry import merged_needs
from niwaki.model.checkpoint import INDEX, STORED_DTYPES, Checkpoint, cut_to_shards, quantization, quantized_config
from niwaki.model.decoder import Block, Decoder
from niwaki.model.device import peak_rss_bytes, pick_device, pick_dtype
from niwaki.model.files import copy_file, write_text

Found = TypeVar("Found")


class CompressionJob:
    """The validated inputs of one compression and the steps it takes."""

    def __init__(
        self,
        model: str,
        out: Path,
        recipe: Recipe,
        dense_stream: bool,
        resume: bool,
        overwrite: bool,
        report: Report,
        before: FirstStage | None = None,
        columns_multiple: int = 1,
    ) -> None:
        self.before, self.columns_multiple = before, columns_multiple
        self.started = time.perf_counter()
        self.out = out.absolute()
        self.report = report
        self.resume, self.overwrite = resume, overwrite
        # How many bits the bytes make is known once the decoder is; until then any bits stand for them.
        self.target: Target = Bits(KEPT_BITS) if recipe.target is None else parse_target(recipe.target)
        self.allocated: dict[str, Any] = {}
        if recipe.allocation not in ALLOCATIONS:
            raise InputError(unknown("allocation", recipe.allocation, ALLOCATIONS))
        recipe = resolve_allocation(recipe)
        self.owl, self.steps = split_options(recipe, self.target)
        self.needs = merged_needs(self.steps)
        self.dense_stream = dense_stream or self.needs.dense
        self.device = pick_device(recipe.device)
        self.partial = partial_of(self.out)
        check_free(self.out, self.partial, resume=resume, overwrite=overwrite)
        self.checkpoint = Checkpoint.open(model)
        self.checkpoint.require_plain()
        check_apart(self.checkpoint.folder, self.out)
        self.decoder = Decoder(self.checkpoint, self.device, pick_dtype(recipe.dtype))
        if recipe.target_bytes is not None:
            self.target = bits_within(recipe.target_bytes, self.decoder)
            self.allocated = {"target_bits": self.target.bits}
        self.targets: Targets = uniform(self.decoder.anatomy, self.target)
        check_possible(self.decoder, recipe, self.steps, self.target, self.out, report)
        if recipe.allocation == "owl":
            owl(self.decoder.anatomy, self.target, [0.0] * len(self.decoder), self.owl)  # refuses what it cannot do
        if recipe.keep_blocks:
            named = () if recipe.keep_blocks == "auto" else recipe.keep_blocks
            kept_targets(self.decoder.anatomy, self.target, named)  # so does this
        batch_tokens = recipe.batch_tokens or default_batch_tokens(self.device)
        self.recipe = recipe.model_copy(update={"device": str(self.device), "batch_tokens": batch_tokens})
        self.windows_ST, self.calibration_source = self._windows()
        self.embeddings = embeddings_to_pack(recipe, self.target, self.decoder)
        self.embedding_parts = cut_to_shards(self.decoder.disk_names(None), self.checkpoint.tensors)
        self.shard_names = self._shard_names()

    def run(self) -> dict[str, Any]:
        """Compresses, or takes up what an earlier run finished; returns the content of run.json."""
        marks = self._fingerprint()
        if self.resume and not self.partial.exists() and (record := finished_record(self.out, marks)):
            self.report(Event.COMPLETE, out=str(self.out))
            return record
        with Run(self.out, marks, resume=self.resume, overwrite=self.overwrite) as run:
            try:
                return self._run(run)
            except (InputError, NumericalError):
                run.discard()  # no later attempt could use what is there
                raise

    def _run(self, run: Run) -> dict[str, Any]:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

        def report(event: str, **fields: Any) -> None:
            run.event(event, **fields)
            self.report(event, **fields)

        report(Event.START, blocks=len(self.decoder), method=self.recipe.method, target=str(self.target))
        with Writer(run, report) as writer:
            self._allocate(run, report)
            self._write_embeddings(run, writer)
            dense = self._stream(run, "dense") if self.dense_stream else None
            if self.embeddings:
                writer.settle()
                self.decoder.load_outer(self._stored_embeddings(run))
            stream = self._stream(run, "compressed")
            gradients = self._gradients(run, report)
            self.decoder.release_outer()

            def finished(index: int) -> dict[str, Tensor] | None:
                return self._stored_block(run, index) if block_part(index) in run.finished else None

            def save(block: Block, lines: list[dict[str, Any]]) -> None:
                if tensors := self._tensors(block, lines):
                    writer.write(block_part(block.index), self.shard_names[block.index], tensors, lines)
                else:
                    run.finish_part(block_part(block.index), {"lines": lines})

            plan = Plan(self.steps, self.targets, self.recipe.seed, self.recipe.pack, gradients=gradients)
            compress_blocks(self.decoder, plan, stream, dense, finished=finished, save=save, report=report)
        return self._finish(run, stream, report)

    def _tensors(self, block: Block, _lines: list[dict[str, Any]]) -> dict[str, Tensor]:
        """What the file of a block holds, by name."""
        return self.decoder.disk_tensors(block)

    def _windows(self) -> tuple[Tensor | None, str]:
        """Token windows [S, T], if the method or the caller wants any, and where they come from."""
        if self.before is not None:
            return self.before.windows_ST, self.before.source
        given = self.recipe.calibration
        own = self.steps[0].kind is not MethodKind.WALK
        scanned = self.recipe.allocation != "uniform" or self.recipe.keep_blocks == "auto" or own
        if not (self.needs.anything or scanned or self.dense_stream or given.files):
            return None, "none"
        return windows_for(
            given,
            self.checkpoint.folder,
            positions=self.decoder.positions,
            vocabulary=self.checkpoint.config.get_text_config().vocab_size,
            seed=self.recipe.seed,
            device=str(self.device),
            report=self.report,
        )

    def _stream(self, run: Run, name: str, ids_ST: Tensor | None = None) -> Stream | None:
        """The windows `ids_ST`, or all of them, before the first block."""
        ids_ST = self.windows_ST if ids_ST is None else ids_ST
        if ids_ST is None:
            return None
        return Stream(
            self.decoder,
            ids_ST,
            batch_tokens=self.recipe.batch_tokens,
            activation_bytes=self.recipe.activation_bytes,
            folder=run.folder / RECORD / "journal",
            name=name,
            learn_batches=self.needs.learn_batches if name == "compressed" else frozenset(),
        )

    def _gradients(self, run: Run, report: Report) -> Callable[[int], Mapping[str, Tensor]]:
        """Squared gradients of the dense model by block, if a method wants them."""
        if not self.needs.gradient:
            return lambda index: {}
        assert self.windows_ST is not None, "gradients are needs of windows"
        return squared_gradients(run, self.decoder, self.windows_ST, self.recipe.activation_bytes, report)

    def _allocate(self, run: Run, report: Report) -> None:
        """Targets that differ between blocks."""
        anatomy, kept, min_bits = self.decoder.anatomy, self.recipe.keep_blocks, self.steps[-1].min_bits
        if self.recipe.allocation == "owl":

            def outliers(block: Block, stream: Stream) -> float:
                return outlier_share(block, collect(block, stream, OWL_NEEDS)[0], self.owl)

            shares = self.allocated["outlier_shares"] = self._scan(run, "outlier_shares", outliers, report)
            self.targets = owl(anatomy, self.target, shares, self.owl)
        if self.recipe.allocation == "sensitivity":
            self.allocated["sensitivities"] = self._scan(run, "sensitivities", sensitivities, report)
            self.targets = spread_bits(anatomy, self.target, self.allocated["sensitivities"], min_bits)
        if kept and isinstance(self.target, Bits):
            if kept == "auto":
                self.allocated["sensitivities"] = self._scan(run, "sensitivities", sensitivity, report)
                kept = tuple(choose_kept(anatomy, self.target, self.allocated["sensitivities"], min_bits))
            self.targets = kept_targets(anatomy, self.target, kept)
            self.allocated |= {"kept_blocks": list(kept), "rest_bits": rest_bits(anatomy, self.target, kept)}
        if self.allocated:
            report(Event.ALLOCATION, **self.allocated)

    def _scan(
        self, run: Run, name: str, measure: Callable[[Block, Stream], Found], report: Report, *, moves: bool = False
    ) -> list[Found]:
        """What `measure` gives for every dense block at its own inputs; kept in the journal as `name`.

        `moves`: it takes the stream past the block itself.
        """
        if "allocation" not in run.finished:
            stream = self._stream(run, "scan")
            assert stream is not None, "what scans asks for windows"
            found: list[Found] = []

            def visit(block: Block) -> None:
                found.append(measure(block, stream))
                report(Event.SCAN, index=block.index, of=len(self.decoder))

            forward(self.decoder, [] if moves else [stream], visit)
            run.finish_part("allocation", {name: found})
        values: list[Found] = run.finished["allocation"][name]
        return values

    def _shard_names(self) -> list[str]:
        """One file per block, then everything outside the blocks in files of about 1 GiB."""
        count = len(self.decoder) + len(self.embedding_parts)
        return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]

    def _write_embeddings(self, run: Run, writer: "Writer") -> None:
        for number, names in enumerate(self.embedding_parts):
            part = _embeddings_part(number)
            if part not in run.finished:
                tensors, lines = read_packed(
                    self.checkpoint, names, self.embeddings, self.recipe.embeddings, self.device
                )
                writer.write(part, self.shard_names[len(self.decoder) + number], tensors, lines)

    def _stored_block(self, run: Run, index: int) -> dict[str, Tensor]:
        """A finished block as plain weights, in the dtype of the checkpoint."""
        entry = run.finished[block_part(index)]
        modules = packed_modules([entry], self.decoder.anatomy.prefix)
        dtypes = {STORED_DTYPES[self.checkpoint.tensors[module + WEIGHT].dtype] for module in modules}
        assert len(dtypes) <= 1, "the matrices of one block share a dtype"
        return read_plain(run.folder / entry["shard"], modules, dtypes.pop() if dtypes else self.checkpoint.dtype)

    def _stored_embeddings(self, run: Run) -> dict[str, Tensor]:
        """Embeddings, final norm and head as every reader of the result will see them."""
        found: dict[str, Tensor] = {}
        for number in range(len(self.embedding_parts)):
            entry = run.finished[_embeddings_part(number)]
            modules = packed_modules([entry], self.decoder.anatomy.prefix)
            found |= read_plain(run.folder / entry["shard"], modules, self.checkpoint.dtype)
        return found

    def _finish(self, run: Run, stream: Stream | None, report: Report) -> dict[str, Any]:
        """Writes everything beside the shards and puts the folder in its place."""
        parts = [entry for name, entry in sorted(run.finished.items()) if "lines" in entry]
        for source in self.checkpoint.aux_files():
            copy_file(source, run.folder / source.name)
        if modules := packed_modules(parts, self.decoder.anatomy.prefix):
            stored = quantization(modules, self.checkpoint.shapes)
            write_text(run.folder / "config.json", quantized_config(self.checkpoint.folder, stored))
        self._settle_config(run)
        write_text(run.folder / INDEX, json.dumps(shard_index(parts), indent=2) + "\n")
        write_text(
            run.folder / RECORD / "blocks.jsonl", "".join(json.dumps(line) + "\n" for line in block_lines(parts))
        )
        record = self._record(run, parts)
        write_text(run.folder / "README.md", model_card(record))
        write_text(run.folder / RECORD / "run.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        self._check(run, stream)
        report(Event.DONE, seconds=record["seconds"], out=str(self.out))
        run.complete()
        return record

    def _settle_config(self, run: Run) -> None:
        """Where a config has to say more than that of the source."""

    def _check(self, run: Run, stream: Stream | None) -> None:
        """A last look at the finished folder; `stream` holds the hidden states behind the last block."""

    def _result(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        return result_of(parts)

    def _record(self, run: Run, parts: list[dict[str, Any]]) -> dict[str, Any]:
        cuda = self.device.type == "cuda"
        record = {
            **provenance("torch", "transformers", "safetensors"),
            "model": {
                "source": str(self.checkpoint.folder),
                "type": self.checkpoint.config.model_type,
                "bytes": self.checkpoint.nbytes,
                "files": self.checkpoint.file_hashes(),
            },
            "fingerprint": run.fingerprint,
            "recipe": self.recipe.model_dump(mode="json"),
            "options": {step.name: vars(step.config) for step in self.steps},
            "dense_stream": self.dense_stream,
            "allocation": self.allocated,
            "calibration": {
                "source": self.calibration_source,
                "windows": None if self.windows_ST is None else list(self.windows_ST.shape),
                "sha256": None if self.windows_ST is None else digest(self.windows_ST),
            },
            "result": self._result(parts),
            "device": torch.cuda.get_device_name(self.device) if cuda else platform.processor() or platform.machine(),
            "seconds": round(time.perf_counter() - self.started, 2),
            "peak_rss_bytes": peak_rss_bytes(),
            "peak_device_bytes": torch.cuda.max_memory_allocated(self.device) if cuda else 0,
        }
        return record if self.before is None else told_of_both(record, self.before)

    def _fingerprint(self) -> dict[str, str]:
        return fingerprint(
            self.checkpoint.fingerprint(),
            "none" if self.windows_ST is None else digest(self.windows_ST),
            self.recipe.model_dump(mode="json"),
            dense_stream=self.dense_stream,
            threads=torch.get_num_threads() if self.device.type == "cpu" else None,
        )


def block_part(index: int) -> str:
    """The name of a block's part in the journal."""
    return f"block-{index:05d}"


def _embeddings_part(number: int) -> str:
    return f"embeddings-{number:05d}"
