"""Sensitivity of a dense model, before anything is compressed: which blocks and which kinds of matrices bear what.

One pass over the calibration windows, block by block; nothing is written. Three measures:

- `damage` of a block: the rise of the model's loss, in nats per token, with this block alone in the published form of
  squeeze10. That is a fifth of the columns at four bits, chosen by PBAR, and the others at one, rounded to nearest. A
  copy of the first windows per block passes the whole model, so that later blocks have their say.
- `error` of a block, or of one matrix in it: the mean relative error of the block's output, all its matrices, or that
  one, rounded to two bits (see `bit_allocation`).
- `lost` of a matrix: PBAR, the score of squeeze10 for its columns, summed over them. It is the energy of the outputs
  that one bit would lose, as a share of their energy. `salient_lost` is the part of it in the worst fifth of the
  columns: what `salient_frac=0.2` protects.

`keep_blocks` and `bits` are the choices of `compress` with this text. The first are the blocks that
`--keep-blocks auto` keeps at four bits. The second are squeeze10's average bits by kind for a target.

    found = measure_sensitivity("MODEL", calibration=["mine.txt"])
    found["blocks"][3]["damage"], found["kinds"]["mlp.down_proj"]["lost"]

Legend: S windows, T tokens, O outputs, I inputs.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from niwaki.compression.bit_allocation import choose_kept, sensitivities, sensitivity, spread_bits
from niwaki.compression.inspect import kind_of, mean
from niwaki.compression.walk import collect, forward
from niwaki.config.events import Event, Report, silent
from niwaki.config.recipe import Calibration, calibration_fields
from niwaki.config.targets import Bits
from niwaki.data.statistics import Needs, Statistics
from niwaki.data.stream import Stream
from niwaki.data.texts import calibration_record, windows_for
from niwaki.methods import squeeze10
from niwaki.model.anatomy import Anatomy
from niwaki.model.decoder import Block, Decoder, open_decoder
from niwaki.model.device import pick_device, pick_dtype
from niwaki.model.logits import token_losses

SALIENT_FRAC = 0.2
TARGETS = (1.75, 2.0, 2.5, 3.0)
PROBE_TOKENS = 2048  # of the windows that the damage is measured on
NAMED = 3  # blocks that are named as the most and the least sensitive
SAMPLES, SEQ_LEN = 32, 512


def measure_sensitivity(
    model: str | Path,
    *,
    calibration: Any = None,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    batch_tokens: int | None = None,
    report: Report = silent,
) -> dict[str, Any]:
    """Return what every block and every matrix of `model` loses, and what follows for bits.

    `calibration` is that of a recipe; 32 windows of 512 tokens if it says nothing else. Raises InputError for a model
    or text that cannot be read.
    """
    fields = {"samples": SAMPLES, "seq_len": SEQ_LEN} | calibration_fields(calibration)
    decoder = open_decoder(model, pick_device(device), pick_dtype(dtype))
    windows = windows_for(Calibration(**fields), decoder, seed=seed, report=report)
    found: list[_BlockLoss] = []
    with tempfile.TemporaryDirectory() as folder:
        stream = Stream(decoder, windows.ids_ST, batch_tokens=batch_tokens, folder=Path(folder))
        probe = _Probe(decoder, windows.ids_ST, Path(folder))

        def visit(block: Block) -> None:
            statistics, _ = collect(block, stream, Needs(gram=True))
            loss, coarse = _measure_block(block, stream, statistics)
            found.append(loss)
            probe.advance(block, coarse)
            report(Event.SCAN, index=block.index, of=len(decoder))

        forward(decoder, [stream], visit)
        damages = probe.damages()
    anatomy = decoder.anatomy
    order = sorted(range(len(found)), key=lambda index: -damages[index])
    return {
        "model": str(model),
        "calibration": calibration_record(windows),
        "seed": seed,
        "blocks": [one.record(index, damages) for index, one in enumerate(found)],
        "kinds": _by_kind(anatomy, found),
        "most_sensitive": order[:NAMED],
        "least_sensitive": order[::-1][:NAMED],
        **_what_follows(anatomy, found),
    }


@dataclass(frozen=True)
class _BlockLoss:
    """Losses of a block: its error, that of each of its matrices, and the PBAR of these."""

    error: float
    errors: Mapping[str, float]
    lost: Mapping[str, float | None]
    salient_lost: Mapping[str, float | None]

    def record(self, index: int, damages: Sequence[float]) -> dict[str, Any]:
        """Return the entry of a block in the result."""
        matrices = {
            name: {"error": error, "lost": self.lost[name], "salient_lost": self.salient_lost[name]}
            for name, error in self.errors.items()
        }
        worst = max(self.errors, key=lambda name: self.errors[name])
        return {
            "block": index,
            "damage": damages[index],
            "share": max(damages[index], 0.0) / (sum(max(damage, 0.0) for damage in damages) or 1.0),
            "error": self.error,
            "worst": worst,
            "matrices": matrices,
        }


class _Probe:
    """Copies of the first windows, one per block and a dense one: copy b passes block b in a coarse form."""

    def __init__(self, decoder: Decoder, ids_ST: Tensor, folder: Path) -> None:
        self.decoder = decoder
        self.count = max(1, min(len(ids_ST), PROBE_TOKENS // ids_ST.shape[1]))
        copies = ids_ST[: self.count].repeat(len(decoder) + 1, 1)
        self.stream = Stream(decoder, copies, folder=folder, name="probe")

    def rows(self, copy: int) -> slice:
        """Return the windows of a copy; the dense one is the last."""
        return slice(copy * self.count, (copy + 1) * self.count)

    @torch.no_grad()
    def advance(self, block: Block, coarse: Mapping[str, Tensor]) -> None:
        """Move every copy past the block; that of the block passes the `coarse` weights [O, I]."""
        dense = {name: block.weight(name).clone() for name in coarse}
        for copy in range(len(self.decoder) + 1):
            for name in coarse if copy in (block.index, block.index + 1) else ():
                block.weight(name).copy_(coarse[name] if copy == block.index else dense[name])
            self.stream.advance(block, self.rows(copy))

    def damages(self) -> list[float]:
        """Return the rise of the mean loss of every copy over that of the dense one, after the last block."""
        self.decoder.load_outer()
        parts = self.decoder.position_slices(self.stream.ids_ST.shape[1])
        *losses, dense = [self._loss(self.rows(copy), parts) for copy in range(len(self.decoder) + 1)]
        return [loss - dense for loss in losses]

    @torch.no_grad()
    def _loss(self, windows: slice, parts: list[slice]) -> float:
        total = 0.0
        for row in range(windows.start, windows.stop):
            own = slice(row, row + 1)
            loss_BT = token_losses(self.decoder.logits, self.stream.ids_ST[own], self.stream.hidden.read(own), parts)
            total += float(loss_BT.double().mean())
        return total / self.count


def _measure_block(
    block: Block, stream: Stream, statistics: Mapping[str, Statistics]
) -> tuple[_BlockLoss, dict[str, Tensor]]:
    """Return what a dense block loses at its inputs, and its weights in the published form of squeeze10.

    The block does not change, and the stream does not advance.
    """
    config = squeeze10.Config(salient_frac=SALIENT_FRAC)
    lost: dict[str, float | None] = {}
    salient_lost: dict[str, float | None] = {}
    coarse: dict[str, Tensor] = {}
    for name in block.linears:
        weight_OI = block.weight(name).float()
        lost[name] = salient_lost[name] = None
        scores_I = weight_OI.square().sum(0)
        if statistics[name].tokens:
            scores_I = squeeze10.robustness(weight_OI, statistics[name], config)
            energy = float(((weight_OI @ statistics[name].gram_II) * weight_OI).sum())
            count = squeeze10.named_split(len(scores_I), config).count
            total = float(scores_I.sum())
            lost[name] = total / (energy or 1.0)
            salient_lost[name] = float(scores_I.sort(descending=True).values[:count].sum()) / (total or 1.0)
        coarse[name] = squeeze10.coarse_form(weight_OI, scores_I, config).to(block.weight(name).dtype)
    errors = sensitivities(block, stream)
    return _BlockLoss(sensitivity(block, stream), errors, lost, salient_lost), coarse


def _by_kind(anatomy: Anatomy, found: Sequence[_BlockLoss]) -> dict[str, dict[str, Any]]:
    """Return by kind of matrix: the errors in every block, their mean and their maximum, and the mean of the PBAR."""
    kinds = dict.fromkeys(kind_of(name) for block in anatomy.blocks for name in block.linears)
    rows: dict[str, dict[str, Any]] = {}
    for kind in kinds:
        by_block = [mean([e for name, e in one.errors.items() if kind_of(name) == kind]) for one in found]
        known = {index: error for index, error in enumerate(by_block) if error is not None}
        worst = max(known, key=lambda index: known[index])
        values = {
            field: [
                v for one in found for name, v in getattr(one, field).items() if kind_of(name) == kind and v is not None
            ]
            for field in ("lost", "salient_lost")
        }
        rows[kind] = {
            "errors": by_block,
            "error": mean(list(known.values())),
            "max_error": known[worst],
            "max_block": worst,
            **{field: mean(own) for field, own in values.items()},
        }
    return rows


def _what_follows(anatomy: Anatomy, found: Sequence[_BlockLoss]) -> dict[str, Any]:
    """Return by target: the blocks that `keep_blocks` auto keeps at four bits, and squeeze10's average bits by kind."""
    kept: dict[str, list[int]] = {}
    bits: dict[str, dict[str, float]] = {}
    config = squeeze10.Config()

    def min_bits(rows: int, columns: int) -> float:
        return squeeze10.min_bits(rows, columns, config)

    for target in map(Bits, TARGETS):
        kept[str(target)] = choose_kept(anatomy, target, [one.error for one in found], min_bits)
        spread = spread_bits(anatomy, target, [one.errors for one in found], min_bits)
        spent: dict[str, list[tuple[float, int]]] = {}
        for block, targets in zip(anatomy.blocks, spread, strict=True):
            for name, linear in block.linears.items():
                own = targets[name]
                assert isinstance(own, Bits)
                spent.setdefault(kind_of(name), []).append((own.bits, linear.rows * linear.columns))
        bits[str(target)] = {kind: sum(b * w for b, w in own) / sum(w for _, w in own) for kind, own in spent.items()}
    return {"keep_blocks": kept, "bits": bits}
