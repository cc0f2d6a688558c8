"""A loaded model in the form that lm_eval asks for. Imported only once that package is known to be there.

Log-likelihoods of a contextual model take the way of its text: the context is read with all weights, and its last
token predicts the first of the continuation; every further token runs through what was chosen. Cost: one forward
a token of the continuation, where dense models need one forward for a batch of whole sequences.

Legend: T tokens, V vocabulary.
"""

import sys
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor


def wrap(model: Any, tokenizer: Any, batch: int) -> "Harnessed":
    """`model` for lm_eval; a contextual one runs sparsely where it would when it writes."""
    return Harnessed(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch)


class Harnessed(HFLM):  # type: ignore[misc]
    """HFLM that shows progress on terminals only, and scores contextual models as they write."""

    def counted(self) -> dict[str, int] | None:
        """Tokens that ran through a part of the weights and through all of them; None for models that choose nothing.

        The runtime keeps no more than its last records, so they are emptied on the way (`_take_records`).
        """
        return getattr(self, "_counted", None)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """(log-likelihood, whether greedy) of every continuation."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """A text for every request."""
        written = super().generate_until(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())
        self._take_records()
        return written

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        if _contextual(self.model) is None:
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        found = []
        for request, context, continuation in requests:
            ids = (context + continuation)[-(self.max_length + 1) :]
            answer = self._score(torch.tensor(ids, device=self.device), len(continuation))
            self.cache_hook.add_partial("loglikelihood", request, answer)
            found.append(answer)
            self._take_records()
        return found

    def _score(self, ids_T: Tensor, wanted: int) -> tuple[float, bool]:
        """Of the last `wanted` tokens of `ids_T`."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        pieces = [ids_T[None, :-wanted], *(ids_T[None, i : i + 1] for i in range(len(ids_T) - wanted, len(ids_T) - 1))]
        rows = [self.model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0, -1] for ids in pieces]
        logprobs_TV = torch.stack(rows).log_softmax(-1)
        wanted_T = ids_T[-wanted:]
        chosen_T = logprobs_TV.gather(1, wanted_T[:, None])[:, 0]
        return float(chosen_T.sum()), bool((logprobs_TV.argmax(-1) == wanted_T).all())

    def _take_records(self) -> None:
        """Adds up what the runtime has recorded since the last time."""
        contextual = _contextual(self.model)
        if contextual is None:
            return
        counted = self.__dict__.setdefault("_counted", {"sparse_tokens": 0, "dense_tokens": 0, "context_tokens": 0})
        for record in contextual.records:
            counted["sparse_tokens"] += record.sparse_tokens
            counted["dense_tokens"] += record.dense_tokens
            counted["context_tokens"] += record.prompt_tokens
        contextual.records = []


def _contextual(model: Any) -> Any:
    """What `niwaki.load` attached, None for other models."""
    return vars(model).get("contextual")
