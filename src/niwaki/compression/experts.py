"""Statistics of the experts of a mixture that few calibration tokens reach.

An expert that met fewer tokens than it has inputs has a singular XᵀX, and what is fitted to it is fitted to noise. Its
statistics are therefore shrunk towards those of the tokens that the router sends to the other experts:

    Gₑ' = Gₑ + k·Pₑ/mₑ

Gₑ is the sum over the nₑ tokens of expert e, and Pₑ that over mₑ tokens of other experts. This is the mean of both with
the weights nₑ and k: `expert_tokens` (k) tokens of the others count beside the own ones, for every expert. An expert
that no token reaches has the statistics of the others alone.

The neurons of two experts have nothing in common, and the inputs of a down projection are those that expert e itself
computes. So Pₑ is measured, and not pooled over matrices. The windows pass the block again, and the rows of its router
are rolled by s. Expert e then meets the tokens of expert e + s. Each part of the windows has its own s = 1, 2, …

Cost: one more forward of the blocks with experts. Memory: the statistics of the experts of a block again.

    shrink_experts(block, stream, statistics, needs, 256)
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from niwaki.compression.run_record import MatrixRecord
from niwaki.config.events import Event, Report
from niwaki.data.statistics import Needs, Statistics
from niwaki.data.stream import Stream
from niwaki.model.anatomy import ROUTER, Anatomy
from niwaki.model.decoder import Block

SHOWN_EXPERTS = 8  # in a warning


def expert_groups(block: Block) -> dict[str, str]:
    """Return the group of every matrix of an expert in a stack, by its name."""
    return {name: linear.group for name, linear in block.linears.items() if linear.expert is not None}


def shrink_experts(
    block: Block, stream: Stream, statistics: Mapping[str, Statistics], needs: Needs, expert_tokens: int
) -> None:
    """Add to the statistics of every expert `expert_tokens` tokens of the other experts of its block (see above).

    Blocks without experts or router stay as they are.
    """
    groups = expert_groups(block)
    routers = _routers(block) if groups and needs.anything and expert_tokens else []
    if not routers:
        return
    others = {leader: Statistics(needs) for leader in dict.fromkeys(groups.values())}

    def add(name: str, x: Tensor) -> None:
        if name in others:
            others[name].add(x)

    turns = max(len(tensors[0]) for tensors in routers) - 1
    size = max(1, min(stream.batch, len(stream) // max(turns, 1)))
    for number, first in enumerate(range(0, len(stream), size)):
        rows = slice(first, min(first + size, len(stream)))
        with _rolled(routers, 1 + number % max(turns, 1)):
            block.run(stream.call(rows, block.index), stream.hidden.read(rows), add)
    for leader, other in others.items():
        statistics[leader].lean_on(other, expert_tokens)


def experts_record(anatomy: Anatomy, lines: Iterable[MatrixRecord], report: Report) -> dict[str, dict[str, list[int]]]:
    """Return the field `experts` of run.json, {} without experts, and warn of experts with few tokens.

    It has by block the calibration tokens that reached each expert: those of its first matrix.
    """
    found: dict[str, dict[int, int]] = {}
    for line in lines:
        linear = anatomy.blocks[line.block].linears.get(line.matrix)
        if linear is not None and linear.expert is not None:
            found.setdefault(str(line.block), {}).setdefault(linear.expert, line.tokens)
    tokens = {block: [count for _, count in sorted(own.items())] for block, own in found.items()}
    if message := few_token_experts(anatomy, tokens):
        report(Event.WARNING, message=message)
    return {"experts": tokens} if tokens else {}


def few_token_experts(anatomy: Anatomy, tokens: Mapping[str, Sequence[int]]) -> str:
    """Return a warning that names the experts with fewer tokens than inputs; empty if there are none.

    The XᵀX of such an expert is singular.
    """
    widths = {
        block: next(m.columns for m in anatomy.blocks[int(block)].linears.values() if m.expert is not None)
        for block in tokens
    }
    few = [
        f"block {block} expert {expert} ({count})"
        for block, own in tokens.items()
        for expert, count in sorted(enumerate(own), key=lambda one: one[1])
        if count < widths[block]
    ]
    if not few:
        return ""
    more = f" and {len(few) - SHOWN_EXPERTS} more, see experts in run.json" * (len(few) > SHOWN_EXPERTS)
    return (
        f"{len(few)} of {sum(map(len, tokens.values()))} experts met fewer calibration tokens than they have inputs "
        f"({max(widths.values()):,}): {', '.join(few[:SHOWN_EXPERTS])}{more}: give more text, or set expert_tokens"
    )


def _routers(block: Block) -> list[list[Tensor]]:
    """Return for each router its weight, and the other tensors of its module that have an entry per expert."""
    found = []
    for parameter, reason in block.anatomy.kept_dense.items():
        if reason == ROUTER:
            weight = block.module.get_parameter(parameter)
            owner = block.module.get_submodule(parameter.rpartition(".")[0])
            beside = [*owner.parameters(), *owner.buffers()]
            alike = [one for one in beside if one is not weight and one.dim() and len(one) == len(weight)]
            found.append([weight, *alike])
    return found


@contextmanager
def _rolled(routers: list[list[Tensor]], shift: int) -> Iterator[None]:
    """Send every expert meanwhile the tokens of the one that comes `shift` places later."""
    kept = [[tensor.detach().clone() for tensor in tensors] for tensors in routers]
    with torch.no_grad():
        for tensors in routers:
            for tensor in tensors:
                tensor.copy_(tensor.roll(-shift, 0))
    try:
        yield
    finally:
        with torch.no_grad():
            for tensors, values in zip(routers, kept, strict=True):
                for tensor, value in zip(tensors, values, strict=True):
                    tensor.copy_(value)
