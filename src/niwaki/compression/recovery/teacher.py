"""Distillation: the divergence of the distribution of a compressed model from that of its dense model.

The loss of a position is KL(dense ‖ compressed) = Σ p · (log p − log q) over the vocabulary, in float32. Its mean over
all positions of a batch is minimized. No label is read, so any text will do.

The dense model is a teacher in one of two ways. It is `resident`: in memory beside the compressed one, and makes its
logits for every batch. Or its most likely tokens are `cached` before the training: the dense model is read one block at
a time, and never lies in memory. The cache keeps the log-probabilities of the K most likely tokens of every position;
all other tokens count as one. That loss is never larger than the whole one, and equal to it if K is the vocabulary.

Without a teacher the loss is that of the next token of the text.

Logits are made in slices of positions (`model.logits`), and each slice runs backwards before the next one.

Legend: S windows, B windows of a batch, T tokens, N positions of a slice, D hidden size, V vocabulary, K likely tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import cross_entropy

from niwaki.compression.result_folder import ResultFolder
from niwaki.compression.run_record import RECORD, JournalEntry
from niwaki.compression.walk import forward
from niwaki.config.events import Event, Report
from niwaki.data.stream import Stream
from niwaki.methods.shared.divergence import divergence
from niwaki.model.decoder import Decoder
from niwaki.model.files import write_shard
from niwaki.model.logits import IGNORED, FinalStates, logits_of_part, position_slices, vocabulary_of

TOP = 64  # likely tokens of a position that the cache keeps
CACHED_TOKENS = 2**18  # per walk through the dense model: hidden states of this many lie in memory
Targets = Callable[[slice], Tensor | tuple[Tensor, Tensor]]  # positions → what the loss of a slice compares with


def likely(logits_NV: Tensor, count: int = TOP) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities [N, K] of the most likely tokens, and their ids."""
    log_p_NK, ids_NK = logits_NV.float().log_softmax(-1).topk(min(count, logits_NV.shape[-1]), dim=-1)
    return log_p_NK, ids_NK.to(torch.int32)


def likely_divergence(log_p_NK: Tensor, ids_NK: Tensor, logits_NV: Tensor) -> Tensor:
    """Return the divergence per position [N] over the tokens of `likely` and all others as one."""
    log_q_NV = logits_NV.log_softmax(-1)
    log_q_NK = log_q_NV.gather(1, ids_NK.long())
    found = (log_p_NK.exp() * (log_p_NK - log_q_NK)).sum(-1)
    if ids_NK.shape[1] == logits_NV.shape[1]:
        return found
    rest_p_N = (1 - log_p_NK.exp().sum(-1)).clamp_min(1e-6)
    log_rest_q_N = log_q_NV.scatter(1, ids_NK.long(), -torch.inf).logsumexp(-1)
    return found + rest_p_N * (rest_p_N.log() - log_rest_q_N)


class Teacher(Protocol):
    """Source of what the logits of a model are compared with, at all but the last `skipped` positions of a window."""

    @property
    def skipped(self) -> int:
        """Return the number of those positions."""

    def targets(self, rows: Sequence[int], ids_BT: Tensor, *, again: bool = False) -> Targets:
        """Return the targets of the windows `rows` of the text, whose tokens are `ids_BT`.

        `again`: the same windows will come again.
        """

    def loss(self, wanted: Any, logits_NV: Tensor) -> Tensor:
        """Return the loss per position [N]."""


@dataclass(frozen=True)
class Resident:
    """Dense model in memory. `kept` has the final hidden states of windows that come again."""

    model: Any
    skipped: int = 0
    kept: dict[tuple[int, ...], tuple[FinalStates, Tensor]] = field(default_factory=dict)

    @torch.no_grad()
    def targets(self, rows: Sequence[int], ids_BT: Tensor, *, again: bool = False) -> Targets:
        """Run the blocks; the logits of a slice are made when they are wanted."""
        if (known := self.kept.get(tuple(rows))) is not None:
            states, x_BTD = known
        else:
            states = FinalStates(self.model)
            x_BTD = states.run(ids_BT, use_cache=False)
        if again:
            self.kept[tuple(rows)] = states, x_BTD

        def of(part: slice) -> Tensor:
            with torch.no_grad():
                return logits_of_part(states.logits, ids_BT, x_BTD, part).float()

        return of

    def loss(self, wanted: Any, logits_NV: Tensor) -> Tensor:
        """Return the divergence."""
        return divergence(wanted, logits_NV)


@dataclass(frozen=True)
class Text:
    """No teacher: the next token of the text."""

    skipped: int = 1

    def targets(self, rows: Sequence[int], ids_BT: Tensor, *, again: bool = False) -> Targets:
        """Return the next tokens."""
        next_BT = torch.full_like(ids_BT, IGNORED)
        next_BT[:, :-1] = ids_BT[:, 1:]
        next_N = next_BT.flatten()
        return lambda part: next_N[part]

    def loss(self, wanted: Any, logits_NV: Tensor) -> Tensor:
        """Return the negative log-likelihood. The last position of a window predicts nothing."""
        return cross_entropy(logits_NV, wanted, reduction="none", ignore_index=IGNORED)


@dataclass(frozen=True)
class Cached:
    """Most likely tokens of the dense model in files of some windows each."""

    files: Sequence[Path]
    windows: int  # per file
    skipped: int = 0

    def targets(self, rows: Sequence[int], ids_BT: Tensor, *, again: bool = False) -> Targets:
        """Read the likely tokens of the windows."""
        log_p, ids = [], []
        for row in rows:
            with safe_open(self.files[row // self.windows], framework="pt") as file:
                place = row % self.windows
                log_p.append(file.get_slice("log_p")[place])
                ids.append(file.get_slice("ids")[place])
        log_p_NK, ids_NK = torch.cat(log_p).to(ids_BT.device).float(), torch.cat(ids).to(ids_BT.device)
        return lambda part: (log_p_NK[part], ids_NK[part])

    def loss(self, wanted: Any, logits_NV: Tensor) -> Tensor:
        """Return the divergence over the likely tokens."""
        log_p_NK, ids_NK = wanted
        return likely_divergence(log_p_NK, ids_NK, logits_NV)


def cached(folder: ResultFolder, dense: Decoder, ids_ST: Tensor, report: Report) -> Cached:
    """Run the dense model over all windows, one block in memory, and keep its likely tokens in the journal.

    A resume goes on after the last file. Cost: 6 · K bytes on the disk per token, and one walk per CACHED_TOKENS.
    """
    count = max(1, CACHED_TOKENS // ids_ST.shape[1])
    parts, files = ids_ST.split(count), []
    for number, part_ST in enumerate(parts):
        part = f"teacher-{number:05d}"
        shard = f"{RECORD}/journal/{part}.safetensors"
        files.append(folder.path / shard)
        if part not in folder.finished:
            sha256 = write_shard(files[-1], _likely_tokens(dense, part_ST))
            folder.finish_part(part, JournalEntry(shard=shard, sha256=sha256))
        report(Event.SCAN, index=number, of=len(parts))
    return Cached(files, count)


@torch.no_grad()
def _likely_tokens(dense: Decoder, ids_ST: Tensor) -> dict[str, Tensor]:
    """Return the likely tokens of windows, [S, T, K] each."""
    stream = Stream(dense, ids_ST, name="teacher")
    forward(dense, [stream])
    log_p, ids = [], []
    for row in range(len(ids_ST)):
        rows = slice(row, row + 1)
        ids_1T, x_1TD = ids_ST[rows], stream.hidden.read(rows)
        for part in dense.position_slices(ids_1T.numel()):
            log_p_NK, ids_NK = likely(logits_of_part(dense.logits, ids_1T, x_1TD, part))
            log_p.append(log_p_NK.half().cpu())
            ids.append(ids_NK.cpu())
    shape = (*ids_ST.shape, -1)
    dense.release_outer()
    return {"log_p": torch.cat(log_p).view(shape), "ids": torch.cat(ids).view(shape)}


@dataclass
class Student:
    """Model that learns, with its loss. Logits are made in slices of `logit_bytes`."""

    model: Any
    teacher: Teacher
    logit_bytes: int | None = None

    def loss(self, rows: Sequence[int], ids_BT: Tensor, *, backward: float = 0.0) -> Tensor:
        """Return the mean loss of all positions, a scalar. Add `backward` times its gradient to the parameters.

        Windows that are only measured come again: they are those that are held out.
        """
        states = FinalStates(self.model)
        targets = self.teacher.targets(rows, ids_BT, again=not backward)
        with torch.set_grad_enabled(backward > 0):
            x_BTD = states.run(ids_BT, use_cache=False)
            leaf_BTD = x_BTD.detach().requires_grad_(backward > 0)
            total, count = torch.zeros((), device=x_BTD.device), len(ids_BT) * (ids_BT.shape[1] - self.teacher.skipped)
            for part in position_slices(ids_BT.numel(), vocabulary_of(self.model), self.logit_bytes):
                logits_NV = logits_of_part(states.logits, ids_BT, leaf_BTD, part)
                logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
                loss = self.teacher.loss(targets(part), logits_NV).sum() / count
                del logits_NV
                if backward > 0:
                    (loss * backward).backward()
                total = total + loss.detach()
                del loss  # its graph holds logits
            if backward > 0:
                x_BTD.backward(leaf_BTD.grad)
        return total
