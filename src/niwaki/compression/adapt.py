"""Adaptation of a predictor: a new one is fitted to recent text, and accepted only if it is better there.

The new predictor is fitted like the first one, on three quarters of the windows of the new text. The last quarter
compares both by the share of true importance in the units that they keep (`contextual.predictor.kept_share`). The
better one stays. A replaced predictor is kept beside the new one, so that it can be put back.

Cost: traces of the new windows, minutes on a CPU for small models. Memory: one block, the hidden states, the traces.

    niwaki.compression.adapt.adapt("OUT", data=["new.jsonl"])
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from niwaki.compression.bos_loss import warn_without_bos
from niwaki.compression.run_record import RunRecord, read_run
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
    """Fit a predictor to the text of `data`, and put it into `out` if it keeps more on held-out windows.

    Returns the shares that both keep, and whether the new one was accepted. `bos`: beginning of every window.

    Raises InputError for a folder without a predictor, or no data; CalibrationError for too little text.
    """
    folder, files = Path(out), as_files(data)
    if not has_shadow(folder):
        raise InputError(f"{folder} holds no predictor: make one with `niwaki compress MODEL {folder} --method shadow`")
    if not files or samples < 8:
        raise InputError("expected data to adapt to (--data FILE) and at least 8 samples")
    check_sources(files)
    old = read_shadow(folder)
    if isinstance(old, InputShadow):
        raise InputError(f"{folder} skips inputs by thresholds, and only predictors of heads and neurons are adapted")
    record = read_run(folder)
    config = _config(record)
    decoder = Decoder(Checkpoint.open(folder), pick_device(device))
    seq_len = fit_seq_len(seq_len, SEQ_LEN, decoder.positions, str(folder), report or silent)
    size: dict[str, Any] = {"samples": samples, "seq_len": seq_len, "seed": seed, "bos": bos}
    calibration = read_calibration(files, field, load_tokenizer(folder), **size, report=report or silent)
    warn_without_bos(decoder, calibration.ids_ST, calibration.bos, report or silent)

    with tempfile.TemporaryDirectory(prefix="niwaki-") as temporary:

        def make(ids_ST: Tensor, name: str) -> Stream:
            return Stream(decoder, ids_ST, folder=Path(temporary), name=name)

        activity = trace(
            decoder, calibration.ids_ST, old.layout, config.criteria, cuts=config.cuts,
            gradient_windows=config.gradient_windows, make_stream=make, folder=Path(temporary),
            report=report or silent,
        )  # fmt: skip
    traces = shadow.samples(activity, old.layout, config)
    cut = len(traces) // 4 // config.cuts * config.cuts  # whole windows
    train, judge = traces.take(slice(0, -cut)), traces.take(slice(-cut, None))
    predictor, _ = shadow.learn(train, old.layout, config, decoder.anatomy.weights)
    share = 1 - old.rule.skip_frac
    kept = {
        name: kept_share(one, judge, old.layout, share) for name, one in (("old", old.predictor), ("new", predictor))
    }
    accepted = kept["new"] > kept["old"]
    result = {"data": list(files), "samples": len(traces), "held_out": len(judge), "kept": kept, "accepted": accepted}
    result |= calibration.about
    decoder.checkpoint.log.check()
    _put(folder, result, replace(old, predictor=predictor) if accepted else None)
    return result


def _put(folder: Path, result: dict[str, Any], new: Shadow | None) -> None:
    """Write what was found, and the new predictor if it was accepted, with the old one beside it."""

    def write(place: Path) -> None:
        (place / HISTORY).parent.mkdir()
        write_text(place / HISTORY, json.dumps(result, indent=2) + "\n")
        if new is not None:
            copy_file(folder / TENSORS, place / PREVIOUS)
            write_shadow(place, new)

    replace_files(folder, write)


def _config(record: RunRecord) -> Any:
    """Return the options that the predictor of a result was fitted with, its criteria as they were chosen."""
    with faults_of("niwaki/run.json does not name the options of the predictor", "compress again"):
        options = {"unit": "prompt"} | {current_name(name): value for name, value in record.options["shadow"].items()}
        predictor = record.result.predictor or {}
        return shadow.Config(**options | {name: predictor[name] for name in shadow.CANDIDATES})
