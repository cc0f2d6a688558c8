"""Adapter of a loaded model for lm_eval. This module is imported only if that package is installed.

Log-likelihoods of a dense model are those of HFLM, in batches of similar length. Only tokens of continuations get
logits, in slices within a budget.

Log-likelihoods of a contextual model follow its generation. The context runs with all weights, and its last token
predicts the first of the continuation. Every later token runs with the selected weights. Cost: one forward per token of
the continuation; dense models need one forward for a batch of whole sequences.

Legend: B sequences, T tokens, N predicted tokens, V vocabulary, D hidden size.
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM, tqdm
from torch import Tensor

from niwaki.data.stream import default_batch_tokens
from niwaki.model.logits import FinalStates, logits_of_part, position_slices, vocabulary_of

Sequence = tuple[list[int], list[tuple[int, list[int]]]]  # tokens read, and (request, continuation) scored on them


def wrap(
    model: Any, tokenizer: Any, batch: int, logit_bytes: int | None = None, special: bool | None = None
) -> "HarnessModel":
    """Wrap `model` for lm_eval. A contextual one skips weights as in generation.

    `special`: whether texts get special tokens; None leaves it to the tokenizer.
    """
    harness = HarnessModel(
        pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch, add_bos_token=special
    )
    harness.logit_bytes = logit_bytes
    return harness


class HarnessModel(HFLM):  # type: ignore[misc]
    """HFLM that shows progress on terminals only, and scores contextual models as they generate.

    `token_counts`: tokens of a contextual model that ran with a part of the weights and with all of them. The runtime
    keeps only its last records, so they are counted and dropped after every request (`_take_records`).
    """

    token_counts: dict[str, int] | None = None
    logit_bytes: int | None = None

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """Return (log-likelihood, whether greedy) of every continuation."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """Return a text for every request."""
        texts = super().generate_until(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())
        self._take_records()
        return texts

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        if _contextual(self.model) is None:
            return self._score_dense(requests, disable_tqdm)
        scores = []
        for request, context, continuation in requests:
            ids = (context + continuation)[-(self.max_length + 1) :]
            score = self._score(torch.tensor(ids, device=self.device), len(continuation))
            self.cache_hook.add_partial("loglikelihood", request, score)
            scores.append(score)
            self._take_records()
        return scores

    def _score_dense(self, requests: Any, disable_tqdm: bool) -> list[tuple[float, bool]]:
        """Score all continuations, in batches of similar length. Equal inputs run once."""
        inputs: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            ids = tuple((context + continuation)[-(self.max_length + 1) :][:-1])
            inputs.setdefault(ids, []).append((index, continuation))
        scores: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        sequences = [(list(ids), own) for ids, own in inputs.items()]
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests") as progress:
            for batch in _batches(sequences, default_batch_tokens(self.device)):
                for index, score in self._score_batch(batch):
                    scores[index] = score
                    if (request := requests[index][0]) is not None:
                        self.cache_hook.add_partial("loglikelihood", request, score)
                    progress.update(1)
        return scores

    def _score_batch(self, batch: list[Sequence]) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Yield (request, (log-likelihood, whether greedy)) of the continuations in one batch."""
        tokens = max(len(ids) for ids, _ in batch)
        ids_BT = torch.tensor([ids + [0] * (tokens - len(ids)) for ids, _ in batch], device=self.device)
        scored = [
            (row * tokens + len(ids), index, continuation)
            for row, (ids, own) in enumerate(batch)
            for index, continuation in own
        ]
        places_N = torch.tensor(
            [end - len(own) + at for end, _, own in scored for at in range(len(own))], device=self.device
        )
        wanted_N = torch.tensor([token for _, _, own in scored for token in own], device=self.device)
        states = FinalStates(self.model)
        x_BTD = states.run(ids_BT, use_cache=False)
        values, greedy = [], []
        for part in position_slices(len(places_N), vocabulary_of(self.model), self.logit_bytes):
            logits_NV = logits_of_part(states.logits, ids_BT, x_BTD, places_N[part])
            logprobs_NV = logits_NV.log_softmax(-1, dtype=self.softmax_dtype)
            del logits_NV
            values.append(logprobs_NV.gather(1, wanted_N[part, None])[:, 0])
            greedy.append(logprobs_NV.argmax(-1) == wanted_N[part])
        sizes = [len(own) for _, _, own in scored]
        parts = zip(scored, torch.cat(values).split(sizes), torch.cat(greedy).split(sizes), strict=True)
        for (_, index, _), values_N, greedy_N in parts:
            yield index, (float(values_N.sum()), bool(greedy_N.all()))

    def _score(self, ids_T: Tensor, wanted: int) -> tuple[float, bool]:
        """Score the last `wanted` tokens of `ids_T` one by one."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        chunks = [ids_T[None, :-wanted], *(ids_T[None, i : i + 1] for i in range(len(ids_T) - wanted, len(ids_T) - 1))]
        total, greedy = 0.0, True
        for chunk_1T, token in zip(chunks, ids_T[-wanted:], strict=True):
            output = self.model(input_ids=chunk_1T, past_key_values=cache, use_cache=True, logits_to_keep=1)
            logprobs_V = output.logits[0, -1].log_softmax(-1)
            total += float(logprobs_V[token])
            greedy = greedy and bool(logprobs_V.argmax() == token)
        return total, greedy

    def _take_records(self) -> None:
        """Count the tokens in the new records of the runtime, and drop the records."""
        contextual = _contextual(self.model)
        if contextual is None:
            return
        counts = self.token_counts or {"sparse_tokens": 0, "dense_tokens": 0, "context_tokens": 0}
        for record in contextual.records:
            counts["sparse_tokens"] += record.sparse_tokens
            counts["dense_tokens"] += record.dense_tokens
            counts["context_tokens"] += record.prompt_tokens
        self.token_counts = counts
        contextual.records = []


def _contextual(model: Any) -> Any:
    """Return the runtime that `niwaki.load` attached, None for other models."""
    return getattr(model, "contextual", None)


def _batches(sequences: list[Sequence], batch_tokens: int) -> Iterator[list[Sequence]]:
    """Yield sequences of similar length, the longest first, whose padded batch has at most `batch_tokens` tokens."""
    batch: list[Sequence] = []
    for sequence in sorted(sequences, key=lambda one: (-len(one[0]), one[0])):
        if batch and (len(batch) + 1) * len(batch[0][0]) > batch_tokens:
            yield batch
            batch = []
        batch.append(sequence)
    yield batch
