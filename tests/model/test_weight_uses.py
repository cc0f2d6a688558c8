"""Classification of the weights of a block by what a short forward does with them, in blocks of our own making."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from niwaki.errors import ArchitectureError
from niwaki.model.anatomy import GATE, ROUTER, SHARED, BlockAnatomy, discover
from niwaki.model.matmul_observer import MatmulObserver, weight_pointers
from niwaki.model.weight_uses import CONVOLVED, ELEMENTS, LOOKED_UP, MULTIPLIED

WIDTH, EXPERTS, HIDDEN = 6, 4, 5


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))))


class Skeleton(transformers.PreTrainedModel):
    """Decoder of blocks of any kind."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__(transformers.PreTrainedConfig(hidden_size=WIDTH))
        self.embed_tokens = nn.Embedding(8, WIDTH)
        self.layers = nn.ModuleList(blocks)

    def _init_weights(self, module: nn.Module) -> None:
        """Leave the weights as they are."""

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        hidden = self.embed_tokens(input_ids)
        for block in self.layers:
            hidden = block(hidden)
        return hidden


class Weights(nn.Module):
    """Block with named weights and a function that uses them."""

    def __init__(self, use: Callable[[Any, Tensor], Tensor], **weights: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.use = use
        for name, weight in weights.items():
            setattr(self, name, weight)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + 0 * self.use(self, hidden_states).sum()


def anatomy_of(use: Callable[[Any, Tensor], Tensor], **weights: nn.Module | nn.Parameter) -> BlockAnatomy:
    return discover(Skeleton(Weights(use, **weights)).to("meta")).blocks[0]


def seen_inputs(block: Weights, x: Tensor) -> dict[str, Tensor]:
    """Return the input of every slice of the stack `w` of a block."""
    found: dict[str, Tensor] = {}

    def observe(name: str, x: Tensor, transposed: bool) -> None:
        assert name not in found
        found[name] = x.clone()

    with torch.no_grad(), MatmulObserver(weight_pointers({"w": block.get_parameter("w")}), observe):
        block(x)
    return found


KEPT: dict[str, tuple[Callable[[Any, Tensor], Tensor], nn.Module | nn.Parameter, str, str]] = {
    "bias of two dimensions": (lambda m, x: x[0, 0] + m.w[1], parameter(3, WIDTH), "w", ELEMENTS),
    "norm of two dimensions": (lambda m, x: x.unflatten(-1, (2, 3)) * m.w, parameter(2, 3), "w", ELEMENTS),
    "state": (lambda m, x: torch.exp(-torch.exp(m.w.double()) * x.mT[0, 0, 0]), parameter(3, 4), "w", ELEMENTS),
    "scatter": (lambda m, x: x.clone().add_(m.w), parameter(1, WIDTH), "w", ELEMENTS),
    "conv1d by channel": (
        lambda m, x: m.w(x.mT), nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH, padding=2), "w.weight", CONVOLVED,
    ),
    "conv1d of all channels": (lambda m, x: m.w(x.mT), nn.Conv1d(WIDTH, WIDTH, 3, padding=2), "w.weight", CONVOLVED),
    "lookup of positions": (lambda m, x: x + m.w(torch.arange(8)), nn.Embedding(8, WIDTH), "w.weight", LOOKED_UP),
    "experts gathered by token": (
        lambda m, x: (m.w[x[0].argmax(-1) % EXPERTS] @ x[0][..., None]), parameter(EXPERTS, HIDDEN, WIDTH), "w",
        MULTIPLIED,
    ),
    "diagonal blocks by columns": (
        lambda m, x: torch.bmm(x.view(-1, 2, 3).mT.reshape(2, -1, 3), m.w.view(4, 2, 3).transpose(0, 1).mT),
        parameter(4, 6), "w", MULTIPLIED,
    ),
    "scaled first": (lambda m, x: x @ (m.w * 2).T, parameter(HIDDEN, WIDTH), "w", MULTIPLIED),
}  # fmt: skip


@pytest.mark.parametrize("case", KEPT)
def test_weights_that_are_no_plain_matrices_stay_dense_with_a_reason(case: str) -> None:
    use, weight, name, reason = KEPT[case]
    both = lambda m, x: use(m, x).sum() + m.up(x).sum()  # noqa: E731
    block = anatomy_of(both, w=weight, up=nn.Linear(WIDTH, HIDDEN))
    assert dict(block.kept_dense) == {name: reason}
    assert list(block.linears) == ["up"]


STACKS: dict[str, tuple[Callable[[Any, Tensor], Tensor], bool]] = {
    "bmm": (lambda m, x: torch.bmm(x.expand(EXPERTS, -1, -1), m.w), True),
    "baddbmm": (lambda m, x: torch.baddbmm(m.b[:, None], x.expand(EXPERTS, -1, -1), m.w), True),
    "matmul": (lambda m, x: x @ m.w, True),
    "matmul of the transposed": (lambda m, x: x @ m.w.mT, False),
    "weight first": (lambda m, x: m.w @ x.mT, False),
    "einsum to all": (lambda m, x: torch.einsum("btd,edf->bef", x, m.w), True),
    "einsum of sorted tokens": (lambda m, x: torch.einsum("etd,edf->etf", x.expand(EXPERTS, -1, -1), m.w), True),
    "einsum of the transposed": (lambda m, x: torch.einsum("...td,efd->...etf", x, m.w), False),
    "slices": (lambda m, x: torch.stack([x @ w for w in m.w]), True),
    "cast": (lambda m, x: x.double() @ m.w.double(), True),
}  # fmt: skip


@pytest.mark.parametrize("case", STACKS)
def test_stacks_are_matrices_however_they_multiply(case: str) -> None:
    use, transposed = STACKS[case]
    shape = (EXPERTS, WIDTH, HIDDEN) if transposed else (EXPERTS, HIDDEN, WIDTH)
    weights = {"w": parameter(*shape)} | ({"b": parameter(EXPERTS, HIDDEN)} if case == "baddbmm" else {})
    block = anatomy_of(use, **weights)
    assert list(block.linears) == [f".{expert}.w" for expert in range(EXPERTS)]
    linear = block.linears[".3.w"]
    assert (linear.rows, linear.columns, linear.transposed) == (HIDDEN, WIDTH, transposed)
    assert dict(block.kept_dense) == ({"b": ELEMENTS} if case == "baddbmm" else {})


@pytest.mark.parametrize("case", STACKS)
def test_every_slice_of_a_stack_meets_its_own_tokens(case: str) -> None:
    use, transposed = STACKS[case]
    shape = (EXPERTS, WIDTH, HIDDEN) if transposed else (EXPERTS, HIDDEN, WIDTH)
    x = torch.randn(1, 7, WIDTH)
    found = seen_inputs(Weights(use, w=parameter(*shape), b=parameter(EXPERTS, HIDDEN)), x)
    assert set(found) == {f"w[{expert}]" for expert in range(EXPERTS)}
    for seen in found.values():
        torch.testing.assert_close(seen.reshape(-1, WIDTH).float(), x[0])


def test_rows_of_zeros_in_a_batched_stack_are_no_tokens() -> None:
    x = torch.randn(1, 7, WIDTH)
    score = torch.tensor([0, 1, 1, 2, 2, 2, 1])[None, :, None] == torch.arange(EXPERTS)[:, None, None]
    found = seen_inputs(Weights(lambda m, x: torch.bmm(x * score, m.w), w=parameter(EXPERTS, WIDTH, HIDDEN)), x)
    assert [len(found[f"w[{expert}]"]) for expert in range(EXPERTS)] == [1, 3, 3, 0]
    torch.testing.assert_close(found["w[1]"], x[0, [1, 2, 6]])


def test_experts_that_few_tokens_reach_are_all_found() -> None:
    """Experts that are modules of their own: one short forward reaches some of them."""

    def route(m: Any, x: Tensor) -> Tensor:
        chosen = m.gate(x[0]).argmax(-1)
        return torch.stack([m.experts[int(index)](token) for index, token in zip(chosen, x[0], strict=True)])

    experts = nn.ModuleList([nn.Linear(WIDTH, HIDDEN) for _ in range(16)])
    block = anatomy_of(route, gate=nn.Linear(WIDTH, 16), experts=experts)
    assert {f"experts.{index}" for index in range(16)} < set(block.linears)


def test_a_weight_that_nothing_uses_is_refused_by_name() -> None:
    with pytest.raises(ArchitectureError, match=re.escape("skip: scale [2, 3], down.weight [5, 6]. A short forward")):
        anatomy_of(
            lambda m, x: m.up(x), up=nn.Linear(WIDTH, HIDDEN), down=nn.Linear(WIDTH, HIDDEN), scale=parameter(2, 3)
        )


def test_a_weight_that_only_a_shape_reads_is_refused() -> None:
    with pytest.raises(ArchitectureError, match=re.escape("skip: w [6, 5]")):
        anatomy_of(
            lambda m, x: m.up(x) + x.new_zeros(m.w.shape[1]), up=nn.Linear(WIDTH, HIDDEN), w=parameter(WIDTH, HIDDEN)
        )


def test_weights_of_several_blocks_stay_dense() -> None:
    common = nn.Linear(WIDTH, HIDDEN)
    blocks = [Weights(lambda m, x: m.common(x) + m.own(x), common=common, own=nn.Linear(WIDTH, HIDDEN)) for _ in "ab"]
    found = discover(Skeleton(*blocks).to("meta")).blocks
    assert [dict(block.kept_dense) for block in found] == [{"common.weight": SHARED}] * 2
    assert list(found[0].linears) == ["own"]


def test_routers_and_gates_are_told_apart() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = parameter(EXPERTS, WIDTH, HIDDEN)

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.gate = nn.Linear(WIDTH, EXPERTS), nn.Linear(WIDTH, 1)
            self.experts = Experts()

        def forward(self, x: Tensor) -> Tensor:
            routed = self.router(x)[0].T[..., None] * x * self.gate(x)
            return torch.bmm(routed, self.experts.up)

    block = anatomy_of(lambda m, x: m.mlp(x), mlp=Mixture())
    assert dict(block.kept_dense) == {"mlp.router.weight": ROUTER, "mlp.gate.weight": GATE}
    assert list(block.linears) == [f"mlp.experts.{expert}.up" for expert in range(EXPERTS)]


PARTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "experts in one matrix": lambda m, x: torch.stack([x @ w.T for w in m.w.view(EXPERTS, HIDDEN, WIDTH)]),
    "one expert": lambda m, x: x @ m.w.view(EXPERTS, HIDDEN, WIDTH)[2].T,
    "diagonal blocks": lambda m, x: torch.bmm(x.expand(EXPERTS, -1, -1), m.w.view(EXPERTS, HIDDEN, WIDTH).mT),
}


@pytest.mark.parametrize("case", PARTS)
def test_equal_parts_of_the_rows_are_matrices(case: str) -> None:
    block = anatomy_of(PARTS[case], w=parameter(EXPERTS * HIDDEN, WIDTH))
    assert list(block.linears) == [f".{expert}.w" for expert in range(EXPERTS)] and not block.kept_dense
    weight = parameter(EXPERTS * HIDDEN, WIDTH)
    linear = block.linears[".2.w"]
    assert (linear.rows, linear.columns) == (HIDDEN, WIDTH)
    assert torch.equal(linear.view(weight), weight[2 * HIDDEN : 3 * HIDDEN])
