"""Adapter of a loaded model for lm_eval. This module is imported only if that package is installed.

Log-likelihoods of a contextual model follow its generation. The context runs with all weights, and its last token
predicts the first of the continuation. Every later token runs with the selected weights. Cost: one forward per token of
the continuation; dense models need one forward for a batch of whole sequences.

Legend: T tokens, V vocabulary.
"""

import sys
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor


def wrap(model: Any, tokenizer: Any, batch: int) -> "HarnessModel":
    """Wrap `model` for lm_eval. A contextual one skips weights as in generation."""
    return HarnessModel(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch)


class HarnessModel(HFLM):  # type: ignore[misc]
    """HFLM that shows progress on terminals only, and scores contextual models as they generate.

    `token_counts`: tokens of a contextual model that ran with a part of the weights and with all of them. The runtime
    keeps only its last records, so they are counted and dropped after every request (`_take_records`).
    """

    token_counts: dict[str, int] | None = None

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
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        scores = []
        for request, context, continuation in requests:
            ids = (context + continuation)[-(self.max_length + 1) :]
            score = self._score(torch.tensor(ids, device=self.device), len(continuation))
            self.cache_hook.add_partial("loglikelihood", request, score)
            scores.append(score)
            self._take_records()
        return scores

    def _score(self, ids_T: Tensor, wanted: int) -> tuple[float, bool]:
        """Score the last `wanted` tokens of `ids_T` one by one."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        chunks = [ids_T[None, :-wanted], *(ids_T[None, i : i + 1] for i in range(len(ids_T) - wanted, len(ids_T) - 1))]
        rows = [self.model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0, -1] for ids in chunks]
        logprobs_TV = torch.stack(rows).log_softmax(-1)
        wanted_T = ids_T[-wanted:]
        wanted_logprobs_T = logprobs_TV.gather(1, wanted_T[:, None])[:, 0]
        return float(wanted_logprobs_T.sum()), bool((logprobs_TV.argmax(-1) == wanted_T).all())

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
