"""The job of a contextual method: trace the dense model, fit a predictor beside its weights, change nothing else.

A mask that holds more of the importance need not be the better one, since importance is itself an estimate. So
candidates are compared by the loss of their masks. All variants pass the blocks side by side, each block read once.
After the prompt of every window, the units that its mask skips put out zero, or their mean in the prompt, as in the
runtime.

Cost of the evaluation: a forward of the windows for every variant. Memory: one block, and the hidden states of the
windows for every variant.

Legend: S windows, B windows in a batch, T tokens, C channels, U units, G units of one kind in a block.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from niwaki.compression.backward import next_token_losses
from niwaki.compression.job import Job, finish, record_of, windows_stream
from niwaki.compression.result_folder import ResultFolder
from niwaki.compression.run_record import RECORD, JournalEntry, ResultRecord, RunRecord, write_lines
from niwaki.compression.skipping import Trial, allocate, by_kind, damages, run_trials, too_harmful
from niwaki.compression.traces import trace
from niwaki.compression.walk import loaded_blocks
from niwaki.config.events import Event, Report, silent
from niwaki.config.targets import Sparsity
from niwaki.data.stream import Stream
from niwaki.errors import TargetError
from niwaki.methods.method import ContextualMethod
from niwaki.methods.shadow import INPUTS, THRESHOLD_WINDOWS, WEIGHTED
from niwaki.model.decoder import Block, Decoder
from niwaki.model.files import copy_file, file_sha256
from niwaki.model.shards import INDEX
from niwaki.runtime.contextual.places import find_places, skipped_frac
from niwaki.runtime.contextual.predictor_files import TENSORS, InputShadow, Running, Shadow, write_shadow
from niwaki.runtime.contextual.selection import Variant
from niwaki.runtime.contextual.traces import Traces, prompt_lengths
from niwaki.runtime.contextual.units import KINDS, UnitLayout, find_layout

PART = "predictor"
MakeStream = Callable[[Tensor, str], Stream]


def contextual_job(job: Job, folder: ResultFolder, report: Report) -> RunRecord:
    """Learn what inputs need, and return the record of the run; the weights of OUT are those of the model."""
    if PART not in folder.finished:
        learn = _learn_inputs if job.stage.steps[0].config.unit == INPUTS else _learn
        learn(job, folder, report)
    checkpoint = job.checkpoint
    index = [INDEX] if (checkpoint.folder / INDEX).is_file() else []
    for name in (*checkpoint.shards, *index):
        _link(checkpoint.folder / name, folder.path / name)
    checkpoint.copy_aux_files(folder.path)
    write_lines(folder.path, [])
    record = record_of(job, folder, _result(job, folder.finished[PART]), {})
    finish(job, folder, report, record)
    return record


def _learn(job: Job, folder: ResultFolder, report: Report) -> None:
    """Trace the model, fit the predictor, and write it."""
    target, step, decoder = job.stage.target, job.stage.steps[0], job.decoder
    assert isinstance(target, Sparsity) and job.windows_ST is not None
    method, config, skip_frac = step.contextual_method, step.config, target.zeros_frac
    layout = find_layout(decoder.anatomy, decoder.model, config.neuron_width)

    make = partial(_stream, job, folder)
    traces = trace(
        decoder, job.windows_ST, layout, config.criteria,
        cuts=config.cuts, gradient_windows=config.gradient_windows, make_stream=make,
        activation_bytes=job.recipe.activation_bytes, folder=folder.path / RECORD / "journal", report=report,
    )  # fmt: skip
    weights = decoder.anatomy.weights
    config, losses = evaluate_candidates(
        method, config, traces, layout, skip_frac, decoder, job.windows_ST, make, report
    )
    predictor, facts = method.learn(method.samples(traces, layout, config), layout, config, weights)
    rule = method.rule(config, skip_frac)
    kept_BU = rule.select(predictor.prior_U[None], layout)
    facts |= {
        "head_criterion": config.head_criterion,
        "criterion": config.criterion,
        "tried": losses,
        "parameters": predictor.parameters,
        "share_of_decoder": predictor.parameters / weights,
        "skipped_frac": float(layout.skipped_frac(kept_BU)),
    }
    sha256 = write_shadow(folder.path, Shadow(predictor, layout, rule, Running(**config.running)))
    nbytes = (folder.path / TENSORS).stat().st_size
    folder.finish_part(PART, JournalEntry(shard=TENSORS, sha256=sha256, bytes=nbytes, found=facts))
    report(Event.SAVED, part=PART)


def _learn_inputs(job: Job, folder: ResultFolder, report: Report) -> None:
    """Set the thresholds of all inputs, and write them. Raises TargetError if the trial shows too much damage."""
    target, step, decoder, ids_ST = job.stage.target, job.stage.steps[0], job.decoder, job.windows_ST
    assert isinstance(target, Sparsity) and ids_ST is not None
    config, skip_frac = step.config, target.zeros_frac
    places = find_places(decoder.anatomy)
    held = step.contextual_method.candidate_rows(len(ids_ST), config)
    make = partial(_stream, job, folder)
    damage = None
    if config.own_scope == "global" or config.score == WEIGHTED:
        damage = damages(
            decoder, places, ids_ST[: min(config.gradient_windows, held.start)], make,
            activation_bytes=job.recipe.activation_bytes, folder=folder.path / RECORD / "journal", report=report,
            weighted=config.score == WEIGHTED,
        )  # fmt: skip

    scales = None if damage is None or config.score != WEIGHTED else damage.scales

    def trials(targets: Sequence[float]) -> list[Trial]:
        if damage is None or config.own_scope == "local":
            shares = [[one] * len(places) for one in targets]
        else:
            shares = [allocate(damage.damage_PL, places, one) for one in targets]
        fitted_ST = ids_ST[: min(THRESHOLD_WINDOWS, held.start)]
        return run_trials(decoder, places, shares, fitted_ST, ids_ST[held.start :], make, report, scales=scales)

    (trial,) = trials([skip_frac])
    if not trial.ratio <= config.max_ratio:
        raise TargetError(too_harmful(skip_frac, trial, config.max_ratio, trials))
    scale_N = None if scales is None else torch.cat(scales)
    threshold_P, running = torch.tensor(trial.thresholds), Running(**config.running)
    shadow = InputShadow(tuple(places), tuple(trial.shares), threshold_P, running, scale_N)
    found = {
        "unit": INPUTS,
        "scope": config.own_scope,
        "score": config.score,
        "places": len(places),
        "parameters": sum(tensor.numel() for tensor in shadow.tensors().values()),
        "skipped_frac": skipped_frac(places, trial.skipped),
        "ratio": trial.ratio,
        "divergence": trial.divergence,
        "windows": len(held),
        "skipped_by_kind": by_kind(places, trial.skipped),
    }
    sha256 = write_shadow(folder.path, shadow)
    nbytes = (folder.path / TENSORS).stat().st_size
    folder.finish_part(PART, JournalEntry(shard=TENSORS, sha256=sha256, bytes=nbytes, found=found))
    report(Event.SAVED, part=PART)


def _stream(job: Job, folder: ResultFolder, ids_ST: Tensor, name: str) -> Stream:
    stream = windows_stream(job, folder, name, ids_ST)
    assert stream is not None
    return stream


def _result(job: Job, entry: JournalEntry) -> ResultRecord:
    """Return the field `result` of run.json."""
    checkpoint, anatomy = job.checkpoint, job.decoder.anatomy
    fields = {
        "weights": anatomy.weights,
        "matrices": sum(len(block.linears) for block in anatomy.blocks),
        "zeros_frac": 0.0,
        "bits": 8.0 * checkpoint.dtype.itemsize,
        "packed": 0,
        "notes": [],
        "bytes": checkpoint.nbytes + entry.bytes,
        "sha256": {
            **{shard: file_sha256(checkpoint.folder / shard) for shard in checkpoint.shards},
            TENSORS: entry.sha256,
        },
        "predictor": entry.found,
    }
    return ResultRecord.model_validate(fields)


def _link(source: Path, target: Path) -> None:
    """Link a file under another name where the file system can, else copy it; niwaki never writes into one."""
    target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        copy_file(source, target)


def losses_after_prompt(
    decoder: Decoder,
    ids_ST: Tensor,
    lengths_S: Tensor,
    layout: UnitLayout,
    variants: Sequence[Variant],
    make_stream: MakeStream,
    report: Report = silent,
) -> list[float]:
    """Return the mean negative log-likelihood of all tokens after the prompts, of every variant.

    `lengths_S`: tokens of the prompt of each window. The first token after it is read with the mask, so the token after
    that one is the first that counts.
    """
    streams = [make_stream(ids_ST, f"trial-{place}") for place in range(len(variants))]
    for block in loaded_blocks(decoder):
        for stream, variant in zip(streams, variants, strict=True):
            for rows in stream.slices():
                with _masked(block, layout, variant, lengths_S[rows], rows):
                    stream.advance(block, rows)
        block.release()
        report(Event.CANDIDATE_BLOCK, index=block.index, of=len(decoder))
    return [_mean_loss(decoder, stream, lengths_S) for stream in streams]


def evaluate_candidates(
    method: ContextualMethod,
    config: Any,
    traces: Mapping[str, Traces],
    layout: UnitLayout,
    skip_frac: float,
    decoder: Decoder,
    ids_ST: Tensor,
    make_stream: MakeStream,
    report: Report = silent,
) -> tuple[Any, dict[str, Any]]:
    """Return what `method.choose_criterion` decides on the windows `ids_ST` of the traces, and the losses."""
    held = method.candidate_rows(len(ids_ST), config)
    lengths = prompt_lengths(ids_ST.shape[1], config.cuts)
    lengths_S = torch.tensor([lengths[window % config.cuts] for window in held])

    def measure(variants: Sequence[Variant]) -> list[float]:
        return losses_after_prompt(decoder, ids_ST[held.start :], lengths_S, layout, variants, make_stream, report)

    return method.choose_criterion(traces, layout, config, skip_frac, decoder.anatomy.weights, measure)


@contextmanager
def _masked(block: Block, layout: UnitLayout, variant: Variant, lengths_B: Tensor, rows: slice) -> Iterator[None]:
    """Mask, for one batch, the skipped units of a block before the matrices that read them."""
    handles = []
    for kind, kept_SLG in zip(KINDS, layout.split(variant.kept_BU), strict=True):
        mean_fill = variant.mean_fill if kind == "neurons" else 0.0
        consumer = block.module.get_submodule(layout.units[kind].consumer)
        hook = _mask(kept_SLG[rows, block.index], lengths_B, mean_fill)
        handles.append(consumer.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mask(kept_BG: Tensor, lengths_B: Tensor, mean_fill: float) -> Callable[[Any, tuple[Tensor]], tuple[Tensor]]:
    """Return a hook before the matrix that reads the units; it gets [B, T, C], or [B·T, C] (OPT)."""

    def change(_module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        x_BTC = args[0].reshape(len(kept_BG), -1, args[0].shape[-1])
        lengths_B1 = lengths_B.to(x_BTC.device)[:, None]
        after_BT = torch.arange(x_BTC.shape[1], device=x_BTC.device) >= lengths_B1
        keep_BC = kept_BG.to(x_BTC.device).repeat_interleave(x_BTC.shape[2] // kept_BG.shape[1], dim=1)
        skipped_BTC = after_BT[..., None] & ~keep_BC[:, None]
        if not mean_fill:
            return (x_BTC.masked_fill(skipped_BTC, 0).view(args[0].shape),)
        mean_BC = x_BTC.masked_fill(after_BT[..., None], 0).sum(1, dtype=torch.float32) / lengths_B1
        instead_B1C = (mean_fill * mean_BC).to(x_BTC.dtype)[:, None]
        return (torch.where(skipped_BTC, instead_B1C, x_BTC).view(args[0].shape),)

    return change


def _mean_loss(decoder: Decoder, stream: Stream, lengths_S: Tensor) -> float:
    """Return the mean loss of the tokens after the prompts."""
    total, count = 0.0, 0
    with torch.no_grad():
        for rows in stream.slices():
            ids_BT = stream.ids_ST[rows]
            loss_BT = next_token_losses(decoder, ids_BT, stream.hidden.read(rows))
            after_BT = torch.arange(ids_BT.shape[1] - 1) >= lengths_S[rows, None]
            total += float(loss_BT[after_BT.to(loss_BT.device)].double().sum())
            count += int(after_BT.sum())
    return total / count
