"""Scores of the dense model, which the comparisons of many candidates share through a folder.

    niwaki compare MODEL OUT-1 --data mine.txt --dense-scores scores
    niwaki compare MODEL OUT-2 --data mine.txt --dense-scores scores    reads what the first one kept

A text has one file with the hidden state of every token after the last block, a task one with the likelihoods of its
answers. The name of a file is a hash of all that decides its numbers: content of the model, tokens, dtype, device and
versions. So a file is right or is not found, and a change of one text or task leaves the others. The values are those
of a comparison without the folder, bit for bit. A process that computes them locks the folder; others wait, then read.

Cost: disk for a state of D numbers per token. Nothing is removed: delete the folder when the table is done.
"""

import fcntl
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from niwaki.compression.bos_loss import bos_windows
from niwaki.config.events import Report
from niwaki.data.bos import Bos
from niwaki.data.hidden_states import Activations, choose_place
from niwaki.errors import InputError, OutputError
from niwaki.measure.compare.scoring import EvaluationInputs, answer_likelihoods
from niwaki.measure.compare.task_metrics import Likelihoods
from niwaki.measure.description import describe_environment
from niwaki.measure.evaluate.final_hidden_states import FinalHiddenStates
from niwaki.measure.evaluate.tasks import Bucket, Item
from niwaki.model.decoder import Decoder
from niwaki.model.files import write_shard
from niwaki.version import __version__

FORMAT = 1  # of what the files hold
HIDDEN, LIKELIHOODS = "hidden", "likelihoods"


@dataclass(frozen=True)
class KeptStates:
    """Hidden states of a text after the last block, read from a file."""

    ids_ST: Tensor
    hidden: Activations

    def __len__(self) -> int:
        return len(self.ids_ST)


def run_dense(
    decoder: Decoder, inputs: EvaluationInputs, bos: Bos, work: Path, kept: str | Path | None, report: Report
) -> tuple[FinalHiddenStates, dict[str, Likelihoods]]:
    """Return the hidden states of all texts and the likelihoods of all answers of the dense model.

    What the folder `kept` holds is read, the rest runs and is kept there. Warn if the loss of the model falls with a
    beginning-of-text token that is off.
    """
    windows = {text.path: text.ids_ST for text in inputs.texts}
    probes = bos_windows(inputs.texts[0].ids_ST, bos, decoder.positions) if inputs.texts else {}
    windows |= probes
    if kept is None:
        states = FinalHiddenStates(decoder, windows, dict(inputs.buckets), work, report)
        answers = answer_likelihoods(states, inputs.items)
    else:
        with _locked(Path(kept)):
            states, answers = _with_folder(_Folder.of(Path(kept), decoder), decoder, windows, inputs, work, report)
    states.warn_of_bos(probes, bos, report)
    return states, answers


def _with_folder(
    folder: "_Folder",
    decoder: Decoder,
    windows: Mapping[str, Tensor],
    inputs: EvaluationInputs,
    work: Path,
    report: Report,
) -> tuple[FinalHiddenStates, dict[str, Likelihoods]]:
    """Return the scores of the folder and of a run for what it lacks, which it then holds too."""
    texts = {name: folder.text(ids_ST) for name, ids_ST in windows.items()}
    tasks = {name: folder.task(own) for name, own in inputs.buckets.items()}
    found = {name: folder.states(path, windows[name]) for name, path in texts.items() if path.is_file()}
    answers = {name: folder.answers(path, inputs.items[name]) for name, path in tasks.items() if path.is_file()}
    missing = {name: ids_ST for name, ids_ST in windows.items() if name not in found}
    unanswered = {name: own for name, own in inputs.buckets.items() if name not in answers}
    states = FinalHiddenStates(decoder, missing, unanswered, work, report)
    answers |= answer_likelihoods(states, {name: inputs.items[name] for name in unanswered})
    for name in missing:
        write_shard(texts[name], {HIDDEN: states.windows[name].hidden.store_STD.cpu()})
    for name in unanswered:
        values = [value for own in answers[name] for value in own]
        write_shard(tasks[name], {LIKELIHOODS: torch.tensor(values, dtype=torch.float64)})
    states.windows.update(found)
    return states, {name: answers[name] for name in inputs.items}


@dataclass(frozen=True)
class _Folder:
    """Files of one dense model, named by a hash. `about`: what decides the numbers beside the inputs."""

    folder: Path
    decoder: Decoder
    about: str

    @classmethod
    def of(cls, folder: Path, decoder: Decoder) -> "_Folder":
        """Return the folder for a model on its device."""
        machine = describe_environment(decoder.device)
        device = [decoder.device.type, machine.accelerator or [machine.processor, torch.get_num_threads()]]
        content = sorted(decoder.checkpoint.fingerprint().items())
        about = [FORMAT, __version__, content, str(decoder.dtype), device, sorted(machine.versions.items())]
        return cls(folder, decoder, json.dumps(about))

    def text(self, ids_ST: Tensor) -> Path:
        """Return the place of the hidden states of a text."""
        return self._place([HIDDEN, list(ids_ST.shape)], [ids_ST])

    def task(self, buckets: Iterable[Bucket]) -> Path:
        """Return the place of the likelihoods of a task."""
        own = list(buckets)
        about = [[list(one.ids_ST.shape), one.rows, one.places, one.spans, one.wanted] for one in own]
        return self._place([LIKELIHOODS, about], [one.ids_ST for one in own])

    def states(self, path: Path, ids_ST: Tensor) -> KeptStates:
        """Return the hidden states of a file."""
        store_STD = _read(path, HIDDEN)
        if store_STD.shape[:2] != ids_ST.shape or store_STD.dtype != self.decoder.dtype:
            raise _damaged(path)
        device = self.decoder.device
        place = choose_place(store_STD.nbytes, device)
        place = place if place == "device" else "disk"  # the file stays mapped
        return KeptStates(ids_ST, Activations(store_STD.to(device) if place == "device" else store_STD, place, device))

    def answers(self, path: Path, items: Iterable[Item]) -> Likelihoods:
        """Return the likelihoods of a file, by question."""
        values, sizes = _read(path, LIKELIHOODS), [len(item.pairs) for item in items]
        if values.shape != (sum(sizes),):
            raise _damaged(path)
        return [own.tolist() for own in values.split(sizes)]

    def _place(self, about: list[Any], tokens: Iterable[Tensor]) -> Path:
        digest = hashlib.sha256((self.about + json.dumps(about)).encode())
        for ids_ST in tokens:
            digest.update(ids_ST.cpu().contiguous().numpy().tobytes())
        return self.folder / f"{digest.hexdigest()}.safetensors"


def _read(path: Path, name: str) -> Tensor:
    try:
        with safe_open(path, "pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor
    except (SafetensorError, OSError) as error:
        raise _damaged(path) from error


def _damaged(path: Path) -> InputError:
    return InputError(f"{path} does not hold the scores that its name promises: delete it, and they are made again")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Wait until no other process computes scores for the folder, and keep others away. Create it if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise OutputError(
            f"cannot write to --dense-scores {folder}: {error.strerror}. Choose another folder"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
