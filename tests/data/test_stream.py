"""Streams: what a block is run for, and what it gives back on the way."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from niwaki.compression.walk import collect
from niwaki.data.statistics import Needs
from niwaki.data.stream import Stream
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.decoder import Block, Decoder
from support.families import build, families
from support.models import CPU, tiny_llama

IDS = torch.randint(1, 90, (5, 12), generator=torch.Generator().manual_seed(0))


def loaded(folder: Path, **options: object) -> tuple[Block, Stream]:
    """The first block, and windows in three batches of two, two and one."""
    decoder = Decoder(Checkpoint.open(folder), CPU)
    stream = Stream(decoder, IDS, batch_tokens=24, **options)  # type: ignore[arg-type]
    return decoder.load(0), stream


def products(block: Block, name: str) -> list[int]:
    """A list that grows with every output of a matrix."""
    found: list[int] = []
    block.module.get_submodule(name).register_forward_hook(lambda module, args, out: found.append(len(out)))
    return found


def test_later_batches_end_before_the_last_product(tmp_path: Path) -> None:
    block, stream = loaded(tiny_llama(tmp_path))
    made, met = products(block, "mlp.down_proj"), []
    first = stream.observe(block, lambda name, x: met.append((name, len(x))))
    assert made == [2]
    assert [size for name, size in met if name == "mlp.down_proj"] == [2, 2, 1]
    assert torch.equal(first, block.run(stream.call(slice(0, 2), 0), stream.hidden.read(slice(0, 2))))


def test_every_batch_runs_to_its_end_where_outputs_are_kept(tmp_path: Path) -> None:
    block, stream = loaded(tiny_llama(tmp_path), learn_batches=frozenset({1}))
    made = products(block, "mlp.down_proj")
    stream.observe(block, lambda name, x: None, outputs=stream.outputs)
    assert made == [2, 2, 1] and stream.outputs is not None
    last = block.run(stream.call([4], 0), stream.hidden.read(slice(4, 5)))
    assert torch.equal(stream.outputs.read(slice(4, 5)), last)


@pytest.mark.parametrize("family", ["llama", "mixtral", "opt"])
def test_statistics_are_those_of_whole_batches(tmp_path: Path, family: str) -> None:
    """With experts, too, that the first batch does not reach."""
    build(families()[family].config).save_pretrained(tmp_path)
    block, stream = loaded(tmp_path, learn_batches=frozenset({1}))
    short, _ = collect(block, stream, Needs(sqnorm=True))
    whole, _ = collect(block, stream, Needs(sqnorm=True, learn_batches=frozenset({1})))
    assert {name: seen.tokens for name, seen in short.items()} == {name: seen.tokens for name, seen in whole.items()}
    for name, seen in short.items():
        assert not seen.tokens or torch.equal(seen.sqnorm_I, whole[name].sqnorm_I)


def test_experts_that_come_later_are_not_missed(tmp_path: Path) -> None:
    """A block whose first batch meets one expert, and whose last matrix is met ahead of another expert's."""
    block, stream = loaded(tiny_llama(tmp_path))
    real, calls = block.run, iter(range(3))

    def run(call: object, x_BTD: Tensor, seen: object = None) -> Tensor:
        names = list(block.linears) if next(calls) else list(block.linears)[:-1]
        for name in names:
            seen(name, x_BTD)  # type: ignore[operator]
        return real(call, x_BTD)  # type: ignore[arg-type]

    block.run = run  # type: ignore[method-assign, assignment]
    met: list[str] = []
    stream.observe(block, lambda name, x: met.append(name))
    assert met.count(list(block.linears)[-1]) == 2 and met.count(next(iter(block.linears))) == 3


def test_advancing_gives_back_what_the_first_batch_became(tmp_path: Path) -> None:
    block, stream = loaded(tiny_llama(tmp_path))
    wanted = block.run(stream.call(slice(0, 2), 0), stream.hidden.read(slice(0, 2)))
    first = stream.advance(block)
    assert torch.equal(first, wanted) and torch.equal(stream.hidden.read(slice(0, 2)), wanted)
    stream.advance(block)
    assert torch.equal(first, wanted)
