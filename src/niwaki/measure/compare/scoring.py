"""What a candidate makes of all texts and questions, beside the dense model's own numbers.

The dense model passes everything once and leaves one hidden state a token (`evaluation.passed`), from which its logits
are made again for every candidate: log-probabilities of the whole vocabulary would be V numbers a token instead of D.
A candidate passes like it, block by block, and both heads run window by window: one block, the two heads and the
hidden states of two models are all that is in memory, whatever the number of candidates.

A contextual result is scored by its own runtime, the whole model in memory: what it skips depends on the prompt.

Legend: T tokens, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from niwaki.config.events import Event, Report
from niwaki.measure.compare.answers import Likelihoods
from niwaki.measure.compare.token_metrics import Scored, Text, score_text
from niwaki.measure.evaluate.final_hidden_states import FinalHiddenStates
from niwaki.measure.evaluate.tasks import Bucket, Item, continued, likelihoods
from niwaki.measure.schema import Scoring
from niwaki.model.decoder import Decoder
from niwaki.runtime.contextual.following import follow
from niwaki.runtime.contextual.record import has_shadow, read_shadow
from niwaki.runtime.contextual.sparsity import Contextual, attach
from niwaki.runtime.load import load


@dataclass(frozen=True)
class Material:
    """What all models are given: windows of every text, questions of every task and their padded sequences."""

    texts: Sequence[Text]
    items: Mapping[str, list[Item]]
    buckets: Mapping[str, list[Bucket]]


@dataclass(frozen=True)
class Scores:
    """Every predicted token under both models, log-likelihoods of every answer, and how they came about."""

    texts: list[Scored]
    answers: dict[str, Likelihoods]
    scoring: Scoring


def passed(decoder: Decoder, material: Material, folder: Path, report: Report) -> FinalHiddenStates:
    """Everything through all blocks of a model."""
    windows = {text.path: text.ids_ST for text in material.texts}
    return FinalHiddenStates(decoder, windows, dict(material.buckets), folder, report)


def answers_of(one: FinalHiddenStates, material: Material) -> dict[str, Likelihoods]:
    """Log-likelihoods of all answers under a model that has passed."""
    return {path: likelihoods(items, one.buckets[path], one.logits) for path, items in material.items.items()}


def score_candidate(
    decoder: Decoder, dense: FinalHiddenStates, material: Material, first_tokens: int, folder: Path, report: Report
) -> Scores:
    """One candidate on everything, by its runtime if it has one of its own."""
    if has_shadow(decoder.checkpoint.folder):
        return _by_runtime(decoder, dense, material, first_tokens, report)
    one = passed(decoder, material, folder, report)
    texts = [score_text(text, _window(dense, text), _window(one, text)) for text in material.texts]
    windows = sum(len(text.ids_ST) for text in material.texts)
    scoring = Scoring(how="streamed", first_tokens=0, windows=windows, dense_windows=0, skipped_frac=0.0)
    return Scores(texts, answers_of(one, material), scoring)


def _by_runtime(
    decoder: Decoder, dense: FinalHiddenStates, material: Material, first_tokens: int, report: Report
) -> Scores:
    """Windows are prompts of `first_tokens` that go on as given, questions are prompts that go on with each answer."""
    folder = decoder.checkpoint.folder
    model = load(folder, device=str(decoder.device), dense=True).to(decoder.dtype)
    contextual = attach(model, read_shadow(folder))
    skipped: list[float] = []
    windows = sum(len(text.ids_ST) for text in material.texts)

    def window(text: Text) -> Callable[[int], Tensor]:
        def logits(row: int) -> Tensor:
            report(Event.COMPARE, done=len(skipped) + 1, of=windows, model=folder.name)
            found_TV = _follow(contextual, text.ids_ST[row], first_tokens)
            record = contextual.records[-1]
            skipped.append(record.skipped_frac[-1] if record.sparse_tokens else 0.0)
            return found_TV

        return logits

    texts = [score_text(text, _window(dense, text), window(text), first_tokens) for text in material.texts]
    answers = {}
    for path, items in material.items.items():
        answers[path] = [[0.0] * len(item.pairs) for item in items]
        for bucket in material.buckets[path]:
            for row, ((item, choice), (split, end)) in enumerate(zip(bucket.places, bucket.spans, strict=True)):
                logits_TV = _follow(contextual, bucket.ids_ST[row, : end - 1], split)  # the last predicts nothing
                answers[path][item][choice] = continued(logits_TV.log_softmax(-1), bucket, row)
    sparse = [share for share in skipped if share]
    scoring = Scoring(
        how="runtime",
        first_tokens=first_tokens,
        windows=windows,
        dense_windows=windows - len(sparse),
        skipped_frac=sum(sparse) / len(sparse) if sparse else 0.0,
    )
    return Scores(texts, answers, scoring)


def _follow(contextual: Contextual, ids_T: Tensor, prompt: int) -> Tensor:
    return follow(contextual, ids_T.to(contextual.model.device), prompt).float()


def _window(one: FinalHiddenStates, text: Text) -> Callable[[int], Tensor]:
    stream = one.windows[text.path]
    return lambda row: one.logits(stream, slice(row, row + 1))[0]
