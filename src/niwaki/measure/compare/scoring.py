"""Scores of a candidate and of the dense model on all texts and questions.

The dense model runs once and keeps one hidden state per token (`FinalHiddenStates`). Its logits are computed again for
every candidate: the log-probabilities would need V numbers per token, the hidden states need D. A candidate also runs
block by block, and both LM heads run on slices of a window within a budget. So one block, two heads and the hidden
states of two models are in memory, for any number of candidates.

A contextual result runs in its own runtime, with the whole model in memory: its skipped weights depend on the prompt.

Legend: T tokens, N positions, V vocabulary, D hidden size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from niwaki.config.events import Event, Report
from niwaki.measure.compare.task_metrics import Likelihoods
from niwaki.measure.compare.token_metrics import Text, TokenScores, score_text
from niwaki.measure.evaluate.final_hidden_states import FinalHiddenStates
from niwaki.measure.evaluate.tasks import Bucket, Item, likelihoods
from niwaki.measure.schema import Scoring
from niwaki.model.decoder import Decoder
from niwaki.model.logits import position_slices, vocabulary_of
from niwaki.runtime.contextual.attach import attach
from niwaki.runtime.contextual.decoding import ReadText, read_text
from niwaki.runtime.contextual.predictor_files import has_shadow, read_shadow
from niwaki.runtime.contextual.sparsity import Contextual
from niwaki.runtime.load import load_checkpoint


@dataclass(frozen=True)
class EvaluationInputs:
    """Inputs of all models: windows of every text, questions of every task and their padded sequences."""

    texts: Sequence[Text]
    items: Mapping[str, list[Item]]
    buckets: Mapping[str, list[Bucket]]


@dataclass(frozen=True)
class CandidateScores:
    """Every predicted token under both models, log-likelihoods of every answer, and the path of the text."""

    texts: list[TokenScores]
    answers: dict[str, Likelihoods]
    scoring: Scoring


def run_blocks(decoder: Decoder, inputs: EvaluationInputs, folder: Path, report: Report) -> FinalHiddenStates:
    """Run all inputs through the blocks of a model."""
    windows = {text.path: text.ids_ST for text in inputs.texts}
    return FinalHiddenStates(decoder, windows, dict(inputs.buckets), folder, report)


def answer_likelihoods(states: FinalHiddenStates, questions: Mapping[str, list[Item]]) -> dict[str, Likelihoods]:
    """Return the log-likelihoods of all answers."""
    return {path: likelihoods(items, states.buckets[path], states.logprobs) for path, items in questions.items()}


def score_candidate(
    decoder: Decoder,
    dense: FinalHiddenStates,
    inputs: EvaluationInputs,
    first_tokens: int,
    folder: Path,
    report: Report,
) -> CandidateScores:
    """Score one candidate on all inputs. A contextual result runs in its own runtime."""
    if has_shadow(decoder.checkpoint.folder):
        return _score_contextual(decoder, dense, inputs, first_tokens, report)
    own = run_blocks(decoder, inputs, folder, report)
    texts = [
        score_text(text, _window_logits(dense, text), _window_logits(own, text), parts=_parts(text, dense, decoder))
        for text in inputs.texts
    ]
    windows = sum(len(text.ids_ST) for text in inputs.texts)
    scoring = Scoring(how="streamed", first_tokens=0, windows=windows, dense_windows=0, skipped_frac=0.0)
    return CandidateScores(texts, answer_likelihoods(own, inputs.items), scoring)


def _score_contextual(
    decoder: Decoder, dense: FinalHiddenStates, inputs: EvaluationInputs, first_tokens: int, report: Report
) -> CandidateScores:
    """Score windows after a prompt of `first_tokens`, and every answer after its question."""
    folder = decoder.checkpoint.folder
    model = load_checkpoint(decoder.checkpoint, device=str(decoder.device), dense=True, hashed=True).to(decoder.dtype)
    runtime = _Runtime(attach(model, read_shadow(folder)), decoder.logit_bytes)
    skipped: list[float] = []
    windows = sum(len(text.ids_ST) for text in inputs.texts)

    def window(text: Text) -> Callable[[int, slice], Tensor]:
        last_row = -1
        followed: ReadText | None = None

        def logits(row: int, part: slice) -> Tensor:
            nonlocal last_row, followed
            if followed is None or row != last_row:
                report(Event.COMPARE, done=len(skipped) + 1, of=windows, model=folder.name)
                last_row, followed = row, runtime.read(text.ids_ST[row], first_tokens)
                record = runtime.contextual.records[-1]
                skipped.append(record.skipped_frac[-1] if record.sparse_tokens else 0.0)
            return followed.logits(part).float()

        return logits

    texts = [
        score_text(text, _window_logits(dense, text), window(text), first_tokens, _parts(text, dense, decoder))
        for text in inputs.texts
    ]
    answers = {}
    for path, items in inputs.items.items():
        answers[path] = [[0.0] * len(item.pairs) for item in items]
        for bucket in inputs.buckets[path]:
            for row, (item, choice), (split, end), wanted in zip(
                bucket.rows, bucket.places, bucket.spans, bucket.wanted, strict=True
            ):
                ids_T = bucket.ids_ST[row, : end - 1]  # the last token of an answer predicts nothing
                answers[path][item][choice] = runtime.likelihood(ids_T, split, wanted)
    sparse = [share for share in skipped if share]
    scoring = Scoring(
        how="runtime",
        first_tokens=first_tokens,
        windows=windows,
        dense_windows=windows - len(sparse),
        skipped_frac=sum(sparse) / len(sparse) if sparse else 0.0,
    )
    return CandidateScores(texts, answers, scoring)


@dataclass(frozen=True)
class _Runtime:
    """A contextual model, and the budget of its logits."""

    contextual: Contextual
    logit_bytes: int | None

    def read(self, ids_T: Tensor, prompt: int) -> ReadText:
        """Run a text of which the first `prompt` tokens are prefill."""
        return read_text(self.contextual, ids_T.to(self.contextual.model.device), prompt)

    def likelihood(self, ids_T: Tensor, prompt: int, wanted: list[int]) -> float:
        """Return the log-likelihood of the tokens `wanted`, the first of which follows the prompt."""
        text, total = self.read(ids_T, prompt), 0.0
        for part in position_slices(len(wanted), vocabulary_of(self.contextual.model), self.logit_bytes):
            place = slice(prompt - 1 + part.start, prompt - 1 + part.stop)
            logprobs_NV = text.logits(place).float().log_softmax(-1)
            wanted_N1 = torch.tensor(wanted[part], device=logprobs_NV.device)[:, None]
            total += float(logprobs_NV.gather(1, wanted_N1).sum(dtype=torch.float64))
        return total


def _parts(text: Text, dense: FinalHiddenStates, decoder: Decoder) -> list[slice]:
    """Cut a window into slices that fit the budget with the vocabulary of both models."""
    tokens = text.ids_ST.shape[1]
    return max(dense.decoder.position_slices(tokens), decoder.position_slices(tokens), key=len)


def _window_logits(states: FinalHiddenStates, text: Text) -> Callable[[int, slice], Tensor]:
    stream = states.windows[text.path]
    return lambda row, part: states.logits(stream, row, part)
