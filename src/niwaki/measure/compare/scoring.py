"""Scores of a candidate and of the dense model on all texts and questions.

The dense model runs once and keeps one hidden state per token (`FinalHiddenStates`). Its logits are computed again for
every candidate: the log-probabilities would need V numbers per token, the hidden states need D. A candidate also runs
block by block, and both LM heads run window by window. So one block, two heads and the hidden states of two models are
in memory, for any number of candidates.

A contextual result runs in its own runtime, with the whole model in memory: its skipped weights depend on the prompt.

Legend: T tokens, V vocabulary, D hidden size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from niwaki.config.events import Event, Report
from niwaki.measure.compare.task_metrics import Likelihoods
from niwaki.measure.compare.token_metrics import Text, TokenScores, score_text
from niwaki.measure.evaluate.final_hidden_states import FinalHiddenStates
from niwaki.measure.evaluate.tasks import Bucket, Item, continuation_likelihood, likelihoods
from niwaki.measure.schema import Scoring
from niwaki.model.decoder import Decoder
from niwaki.runtime.contextual.decoding import logits_of_text
from niwaki.runtime.contextual.predictor_files import has_shadow, read_shadow
from niwaki.runtime.contextual.sparsity import Contextual, attach
from niwaki.runtime.load import load


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


def answer_likelihoods(states: FinalHiddenStates, inputs: EvaluationInputs) -> dict[str, Likelihoods]:
    """Return the log-likelihoods of all answers."""
    return {path: likelihoods(items, states.buckets[path], states.logits) for path, items in inputs.items.items()}


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
    texts = [score_text(text, _window_logits(dense, text), _window_logits(own, text)) for text in inputs.texts]
    windows = sum(len(text.ids_ST) for text in inputs.texts)
    scoring = Scoring(how="streamed", first_tokens=0, windows=windows, dense_windows=0, skipped_frac=0.0)
    return CandidateScores(texts, answer_likelihoods(own, inputs), scoring)


def _score_contextual(
    decoder: Decoder, dense: FinalHiddenStates, inputs: EvaluationInputs, first_tokens: int, report: Report
) -> CandidateScores:
    """Score windows after a prompt of `first_tokens`, and every answer after its question."""
    folder = decoder.checkpoint.folder
    model = load(folder, device=str(decoder.device), dense=True).to(decoder.dtype)
    contextual = attach(model, read_shadow(folder))
    skipped: list[float] = []
    windows = sum(len(text.ids_ST) for text in inputs.texts)

    def window(text: Text) -> Callable[[int], Tensor]:
        def logits(row: int) -> Tensor:
            report(Event.COMPARE, done=len(skipped) + 1, of=windows, model=folder.name)
            logits_TV = _follow(contextual, text.ids_ST[row], first_tokens)
            record = contextual.records[-1]
            skipped.append(record.skipped_frac[-1] if record.sparse_tokens else 0.0)
            return logits_TV

        return logits

    texts = [score_text(text, _window_logits(dense, text), window(text), first_tokens) for text in inputs.texts]
    answers = {}
    for path, items in inputs.items.items():
        answers[path] = [[0.0] * len(item.pairs) for item in items]
        for bucket in inputs.buckets[path]:
            for row, ((item, choice), (split, end)) in enumerate(zip(bucket.places, bucket.spans, strict=True)):
                logits_TV = _follow(contextual, bucket.ids_ST[row, : end - 1], split)  # the last predicts nothing
                answers[path][item][choice] = continuation_likelihood(logits_TV.log_softmax(-1), bucket, row)
    sparse = [share for share in skipped if share]
    scoring = Scoring(
        how="runtime",
        first_tokens=first_tokens,
        windows=windows,
        dense_windows=windows - len(sparse),
        skipped_frac=sum(sparse) / len(sparse) if sparse else 0.0,
    )
    return CandidateScores(texts, answers, scoring)


def _follow(contextual: Contextual, ids_T: Tensor, prompt: int) -> Tensor:
    return logits_of_text(contextual, ids_T.to(contextual.model.device), prompt).float()


def _window_logits(states: FinalHiddenStates, text: Text) -> Callable[[int], Tensor]:
    stream = states.windows[text.path]
    return lambda row: states.logits(stream, slice(row, row + 1))[0]
