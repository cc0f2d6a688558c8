"""Adaptation of a predictor or of thresholds to recent text; new ones are accepted only if they are better there.

Thresholds of inputs keep the shares of their places and are set again, because other text has inputs of other sizes. A
new predictor is fitted like the first one, on three quarters of the windows of the new text. The last quarter
compares both by the share of true importance in the units that they keep (`contextual.predictor.kept_share`). The
better one stays. A replaced predictor is kept beside the new one, so that it can be put back.

Cost: traces of the new windows, minutes on a CPU for small models. Memory: one block, the hidden states, the traces.

    niwaki.compression.adapt.adapt("OUT", data=["new.jsonl"])
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from niwaki.compression.bos_loss import warn_without_bos
from niwaki.compression.run_record import RunRecord, read_run
from niwaki.compression.skipping import run_trials
from niwaki.compression.traces import trace
from niwaki.compression.verify import replace_files
from niwaki.config.events import Report, silent
from niwaki.config.recipe import BosPolicy, as_files, current_name
from niwaki.config.sources import check_sources
from niwaki.data.stream import Stream
from niwaki.data.text_amount import fit_seq_len
from niwaki.data.texts import load_tokenizer, read_calibration
from niwaki.errors import InputError, faults_of
from niwaki.methods import shadow
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.decoder import Decoder
from niwaki.model.device import pick_device
from niwaki.model.files import copy_file, write_text
from niwaki.runtime.contextual.places import skipped_frac
from niwaki.runtime.contextual.predictor import kept_share
from niwaki.runtime.contextual.predictor_files import (
    TENSORS,
    InputShadow,
    Shadow,
    has_shadow,
    read_shadow,
    write_shadow,
)

PREVIOUS = "niwaki/shadow.previous.safetensors"
HISTORY = "niwaki/adapted.json"
SEQ_LEN = 512
SAME_SHARE = 0.01  # a difference of shares that does not count


def adapt(
    out: str | Path,
    *,
    data: str | Path | Sequence[str | Path],
    samples: int = 128,
    seq_len: int = SEQ_LEN,
    field: str = "text",
    seed: int = 0,
    device: str = "auto",
    bos: BosPolicy = "auto",
    report: Report | None = None,
) -> dict[str, Any]:
    """Fit a predictor or thresholds to the text of `data`, and put them into `out` if they are better on held-out text.

    Returns what both keep or skip, and whether the new ones were accepted. `bos`: beginning of every window.

    Raises InputError for a folder without a predictor, or no data; CalibrationError for too little text.
    """
    folder, files = Path(out), as_files(data)
    if not has_shadow(folder):
        raise InputError(f"{folder} holds no predictor: make one with `niwaki compress MODEL {folder} --method shadow`")
    if not files or samples < 8:
        raise InputError("expected data to adapt to (--data FILE) and at least 8 samples")
    check_sources(files)
    old = read_shadow(folder)
    config = _config(read_run(folder), old)
    decoder = Decoder(Checkpoint.open(folder), pick_device(device))
    seq_len = fit_seq_len(seq_len, SEQ_LEN, decoder.positions, str(folder), report or silent)
    size: dict[str, Any] = {"samples": samples, "seq_len": seq_len, "seed": seed, "bos": bos}
    calibration = read_calibration(files, field, load_tokenizer(folder), **size, report=report or silent)
    warn_without_bos(decoder, calibration.ids_ST, calibration.bos, report or silent)

    with tempfile.TemporaryDirectory(prefix="niwaki-") as temporary:
        work = _Work(decoder, calibration.ids_ST, config, Path(temporary), report or silent)
        new: Shadow | InputShadow | None
        found, new = _new_thresholds(old, work) if isinstance(old, InputShadow) else _new_predictor(old, work)
    result = {"data": list(files), **found, "accepted": new is not None, **calibration.about}
    decoder.checkpoint.log.check()
    _put(folder, result, new)
    return result


@dataclass(frozen=True)
class _Work:
    """Windows of the new text, the options of the compression, and a folder for what does not fit in memory."""

    decoder: Decoder
    ids_ST: Tensor
    config: Any
    folder: Path
    report: Report

    def stream(self, ids_ST: Tensor, name: str) -> Stream:
        """Return windows before the first block."""
        return Stream(self.decoder, ids_ST, folder=self.folder, name=name)


def _new_predictor(old: Shadow, work: _Work) -> tuple[dict[str, Any], Shadow | None]:
    """Return what both predictors keep, and the new one if it keeps more."""
    config = work.config
    activity = trace(
        work.decoder, work.ids_ST, old.layout, config.criteria, cuts=config.cuts,
        gradient_windows=config.gradient_windows, make_stream=work.stream, folder=work.folder, report=work.report,
    )  # fmt: skip
    traces = shadow.samples(activity, old.layout, config)
    cut = len(traces) // 4 // config.cuts * config.cuts  # whole windows
    train, judge = traces.take(slice(0, -cut)), traces.take(slice(-cut, None))
    predictor, _ = shadow.learn(train, old.layout, config, work.decoder.anatomy.weights)
    share = 1 - old.rule.skip_frac
    kept = {
        name: kept_share(one, judge, old.layout, share) for name, one in (("old", old.predictor), ("new", predictor))
    }
    found = {"samples": len(traces), "held_out": len(judge), "kept": kept}
    return found, replace(old, predictor=predictor) if kept["new"] > kept["old"] else None


def _new_thresholds(old: InputShadow, work: _Work) -> tuple[dict[str, Any], InputShadow | None]:
    """Return what both lists of thresholds skip and lose, and the new ones if they are better.

    Those that miss the wanted share by less are better; at about the same share, those with less divergence.
    """
    cut = len(work.ids_ST) // 4
    fitted_ST, held_ST = work.ids_ST[:-cut], work.ids_ST[-cut:]
    new, former = run_trials(
        work.decoder, old.places, [old.shares], fitted_ST[: shadow.THRESHOLD_WINDOWS], held_ST, work.stream,
        work.report, known=[old.threshold_P.tolist()],
        scales=None if old.scale_N is None else old.scale_N.split([place.inputs for place in old.places]),
    )  # fmt: skip
    both = {"old": former, "new": new}
    skipped = {name: skipped_frac(old.places, trial.skipped) for name, trial in both.items()}
    found = {
        "samples": len(work.ids_ST),
        "held_out": cut,
        "wanted": old.skip_frac,
        "skipped": skipped,
        "divergence": {name: trial.divergence for name, trial in both.items()},
    }
    rank = {
        name: (max(abs(skipped[name] - old.skip_frac) - SAME_SHARE, 0.0), trial.divergence)
        for name, trial in both.items()
    }
    better = rank["new"] < rank["old"]
    return found, replace(old, threshold_P=torch.tensor(new.thresholds)) if better else None


def _put(folder: Path, result: dict[str, Any], new: Shadow | InputShadow | None) -> None:
    """Write what was found, and the new predictor if it was accepted, with the old one beside it."""

    def write(place: Path) -> None:
        (place / HISTORY).parent.mkdir()
        write_text(place / HISTORY, json.dumps(result, indent=2) + "\n")
        if new is not None:
            copy_file(folder / TENSORS, place / PREVIOUS)
            write_shadow(place, new)

    replace_files(folder, write)


def _config(record: RunRecord, old: Shadow | InputShadow) -> Any:
    """Return the options that the predictor of a result was fitted with, its criteria as they were chosen."""
    with faults_of("niwaki/run.json does not name the options of the predictor", "compress again"):
        options = {"unit": "prompt"} | {current_name(name): value for name, value in record.options["shadow"].items()}
        if isinstance(old, InputShadow):
            return shadow.Config(**options)
        predictor = record.result.predictor or {}
        return shadow.Config(**options | {name: predictor[name] for name in shadow.CANDIDATES})
