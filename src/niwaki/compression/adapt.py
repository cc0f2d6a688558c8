"""A predictor that follows the text it meets: learned anew from recent text, taken only if it is better there.

The new predictor is fitted as the first one was, on three quarters of the windows of the new text; on the last quarter
both are judged by the share of true importance that the units they would keep hold (`contextual.predictor.kept_share`).
The better one stays. The one that is replaced is kept beside it, so that it can be put back.

Cost: `tracing` of the new windows, minutes on a CPU for small models. Memory: one block, the hidden states, the traces.

    niwaki.compression.adapt.adapt("OUT", data=["new.jsonl"])
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from niwaki.compression.run import RECORD
from niwaki.compression.traces import trace
from niwaki.config.events import Report, silent
from niwaki.config.recipe import as_files, current_name
from niwaki.config.sources import check_sources
from niwaki.data.stream import Stream
from niwaki.data.texts import calibration_windows, check_seq_len, load_tokenizer, read_texts
from niwaki.errors import InputError
from niwaki.methods import shadow
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.decoder import Decoder
from niwaki.model.device import pick_device
from niwaki.model.files import copy_file, write_text
from niwaki.runtime.contextual.predictor import kept_share
from niwaki.runtime.contextual.record import TENSORS, has_shadow, read_shadow, write_shadow

PREVIOUS = "niwaki/shadow.previous.safetensors"
HISTORY = "niwaki/adapted.json"


def adapt(
    out: str | Path,
    *,
    data: str | Path | Sequence[str | Path],
    samples: int = 128,
    seq_len: int = 512,
    field: str = "text",
    seed: int = 0,
    device: str = "auto",
    report: Report | None = None,
) -> dict[str, Any]:
    """Fits the predictor in `out` to the text of `data`; returns what both keep on held-out windows, and which stayed.

    Raises InputError for a folder without a predictor, or no data; CalibrationError for too little text.
    """
    folder, files = Path(out), as_files(data)
    if not has_shadow(folder):
        raise InputError(f"{folder} holds no predictor: make one with `niwaki compress MODEL {folder} --method shadow`")
    if not files or samples < 8:
        raise InputError("expected data to adapt to (--data FILE) and at least 8 samples")
    check_sources(files)
    old = read_shadow(folder)
    record = json.loads((folder / RECORD / "run.json").read_text(encoding="utf-8"))
    settled = {name: record["result"]["predictor"][name] for name in shadow.CANDIDATES}
    options = {current_name(name): value for name, value in record["options"]["shadow"].items()}
    config = shadow.Config(**{**options, **settled})
    decoder = Decoder(Checkpoint.open(folder), pick_device(device))
    check_seq_len(seq_len, 512, decoder.positions, str(folder))
    tokenizer = load_tokenizer(folder)
    windows_ST = calibration_windows(read_texts(files, field), tokenizer, samples=samples, seq_len=seq_len, seed=seed)

    with tempfile.TemporaryDirectory(prefix="niwaki-") as temporary:

        def make(ids_ST: Tensor, name: str) -> Stream:
            return Stream(decoder, ids_ST, folder=Path(temporary), name=name)

        found = trace(
            decoder, windows_ST, old.layout, config.criteria, cuts=config.cuts,
            gradient_windows=config.gradient_windows, make_stream=make, folder=Path(temporary),
            report=report or silent,
        )  # fmt: skip
    traces = shadow.samples(found, old.layout, config)
    cut = len(traces) // 4 // config.cuts * config.cuts  # whole windows
    train, judge = traces.take(slice(0, -cut)), traces.take(slice(-cut, None))
    predictor, _ = shadow.learn(train, old.layout, config, decoder.anatomy.weights)
    share = 1 - old.rule.skip_frac
    kept = {
        name: kept_share(one, judge, old.layout, share) for name, one in (("old", old.predictor), ("new", predictor))
    }
    accepted = kept["new"] > kept["old"]
    if accepted:
        copy_file(folder / TENSORS, folder / PREVIOUS)
        record["result"]["sha256"][TENSORS] = write_shadow(folder, replace(old, predictor=predictor))
        write_text(folder / RECORD / "run.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    result = {"data": list(files), "samples": len(traces), "held_out": len(judge), "kept": kept, "accepted": accepted}
    write_text(folder / HISTORY, json.dumps(result, indent=2) + "\n")
    return result
