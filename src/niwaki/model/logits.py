"""Logits in slices of positions, so that their memory is a budget and not batch × tokens × vocabulary.

Final norm, LM head, scaling and soft caps treat every position alone. So a part of the positions runs through the
model's own forward as sequences of one token, with stubs in place of its blocks. The values are those of the whole
logits, up to the order of sums inside a product. Positions that fit the budget together run as they are.

`LOGIT_BYTES` limits the logits of one slice in float32. Softmax, a second model or a gradient take a few times as much.

Legend: B sequences of a batch, T tokens, N positions, D hidden size, V vocabulary.

    for part in position_slices(ids_BT.numel(), vocabulary, LOGIT_BYTES):
        logits_NV = logits_of_part(decoder.logits, ids_BT, x_BTD, part)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from niwaki.errors import ArchitectureError, InputError
from niwaki.model.anatomy import find_blocks
from niwaki.model.block_calls import Call, hidden_dims, stubbed

LOGIT_BYTES = 256 * 2**20
FLOAT_BYTES = 4
PIECE_ELEMENTS = 2**22  # 16 MB in float32
IGNORED = -100  # target of a position that predicts nothing, as in torch

Logits = Callable[[Tensor, Tensor], Tensor]  # (ids_BT, x_BTD) → logits [B, T, V]


def vocabulary_of(model: Any) -> int:
    """Return V, the rows of the LM head."""
    head = model.get_output_embeddings()
    if head is None:
        return int(model.config.get_text_config().vocab_size)
    return int(getattr(head, "out_features", None) or head.weight.shape[0])


def position_slices(count: int, vocabulary: int, logit_bytes: int | None = None) -> list[slice]:
    """Cut `count` positions into slices whose logits fit the budget. Raise InputError if not one position does."""
    limit = LOGIT_BYTES if logit_bytes is None else logit_bytes
    size = limit // (FLOAT_BYTES * vocabulary)
    if size < 1:
        raise InputError(
            f"logit_bytes {limit}: the logits of one position take {FLOAT_BYTES * vocabulary} bytes "
            f"({vocabulary} tokens in the vocabulary): give at least that many"
        )
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


def row_pieces(values_NV: Tensor) -> tuple[Tensor, ...]:
    """Cut a tensor into pieces of rows, because torch copies what it sums in a wider type."""
    pieces: tuple[Tensor, ...] = values_NV.split(max(1, PIECE_ELEMENTS // values_NV.shape[-1]))
    return pieces


def logits_of_part(logits: Logits, ids_BT: Tensor, x_BTD: Tensor, part: slice | Tensor) -> Tensor:
    """Return the logits [N, V] of the positions `part` of the flattened batch. Differentiable if the hidden state is.

    A slice of all positions keeps the shape of the batch. Others are sequences of one token.
    """
    if isinstance(part, slice) and part == slice(0, ids_BT.numel()):
        return logits(ids_BT, x_BTD).flatten(0, 1)
    x_N1D = x_BTD.flatten(0, 1)[part].unsqueeze(1)
    return logits(ids_BT.reshape(-1)[part, None], x_N1D).squeeze(1)


def token_losses(logits: Logits, ids_BT: Tensor, x_BTD: Tensor, parts: list[slice], *, gradient: bool = False) -> Any:
    """Return the negative log-likelihood [B, T − 1] of every predicted token, float32 or wider.

    With `gradient`, return it with the gradient [B, T, D] of the sum over windows of their mean losses. Every slice
    runs forwards and backwards before the next one.
    """
    targets_BT = torch.full_like(ids_BT, IGNORED)
    targets_BT[:, :-1] = ids_BT[:, 1:]
    targets_N = targets_BT.reshape(-1).to(x_BTD.device)
    leaf_BTD = x_BTD.detach().clone().requires_grad_(True) if gradient else x_BTD.detach()
    grad_BTD: Tensor | None = None
    losses: list[Tensor] = []
    for part in parts:
        with torch.set_grad_enabled(gradient):
            logits_NV = logits_of_part(logits, ids_BT, leaf_BTD, part)
            logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
            loss_N = cross_entropy(logits_NV, targets_N[part], reduction="none", ignore_index=IGNORED)
        del logits_NV
        if gradient:
            (part_BTD,) = torch.autograd.grad(loss_N.sum() / (ids_BT.shape[1] - 1), [leaf_BTD])
            grad_BTD = part_BTD if grad_BTD is None else grad_BTD.add_(part_BTD)
        losses.append(loss_N.detach())
        del loss_N  # its graph holds logits
    loss_BT = torch.cat(losses).view(len(ids_BT), -1)[:, :-1].contiguous()
    return (loss_BT, grad_BTD) if gradient else loss_BT


@contextmanager
def one_position(model: Any) -> Iterator[None]:
    """Give the LM head one position of every forward inside, because its logits are not read."""
    head = model.get_output_embeddings()
    if head is None:
        raise ArchitectureError(f"{type(model).__name__} has no LM head: expected a causal language model")
    hook = head.register_forward_pre_hook(lambda _module, args: (args[0].flatten(0, -2)[None, -1:], *args[1:]))
    try:
        yield
    finally:
        hook.remove()


@dataclass
class FinalStates:
    """Hidden states after the last block of a whole model, from which logits are made when they are wanted."""

    model: Any
    sizes: dict[int, int | None] = field(default_factory=dict)  # of the tuple that a block returns
    dims: tuple[int, int] = (0, 1)  # of windows and tokens in the model's own hidden states

    def run(self, ids_BT: Tensor, **inputs: Any) -> Tensor:
        """Run the model and return the hidden states [B, T, …, D]. The LM head gets one position only."""
        blocks = find_blocks(self.model)[1]
        found: list[Tensor] = []

        def collect(index: int) -> Callable[[nn.Module, Any, Any], None]:
            def hook(_module: nn.Module, _args: Any, out: Any) -> None:
                self.sizes[index] = len(out) if isinstance(out, tuple | list) else None
                if index == len(blocks) - 1:
                    found[:] = [out[0] if isinstance(out, tuple | list) else out]  # a hook may run the model before

            return hook

        hooks = [block.register_forward_hook(collect(index)) for index, block in enumerate(blocks)]
        try:
            with one_position(self.model):
                self.model(input_ids=ids_BT, **inputs)
        finally:
            for hook in hooks:
                hook.remove()
        if found[0].dim() > 3:
            self.dims = hidden_dims(blocks, self._embed)
        return found[0].movedim(self.dims, (0, 1))

    def _embed(self, count: int, tokens: int) -> Any:
        ids_BT = torch.zeros(count, tokens, dtype=torch.int64, device=self.model.device)
        return self.model(input_ids=ids_BT, use_cache=False)

    def logits(self, ids_BT: Tensor, x_BTD: Tensor) -> Tensor:
        """Return the logits [B, T, V] of hidden states."""
        blocks = find_blocks(self.model)[1]

        def stub(index: int, call: Call, hidden_BTD: Tensor) -> Any:
            out_BTD = x_BTD.movedim((0, 1), self.dims) if index == len(blocks) - 1 else hidden_BTD
            size = self.sizes[index]
            return out_BTD if size is None else (out_BTD, *[None] * (size - 1))

        with stubbed(blocks, stub), torch.set_grad_enabled(x_BTD.requires_grad):
            logits: Tensor = self.model(input_ids=ids_BT, use_cache=False).logits
        return logits
