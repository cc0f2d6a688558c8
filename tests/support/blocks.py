"""First block of a random Llama with its inputs, for methods that learn."""

from pathlib import Path

import torch
from torch import Tensor

from niwaki.compression.walk import collect
from niwaki.data.stream import CalibrationData, Stream
from niwaki.methods import wandapp
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.decoder import Block, Decoder
from support.models import CPU, tiny_llama


def first_block(tmp_path: Path, windows: int = 9, **changes: object) -> tuple[Block, Stream]:
    """Return the first block of a random Llama and the stream of its inputs."""
    decoder = Decoder(Checkpoint.open(tiny_llama(tmp_path / "model", **changes)), CPU)
    ids = torch.randint(0, 4096, (windows, 24), generator=torch.Generator().manual_seed(1))
    stream = Stream(decoder, ids, learn_batches=frozenset({1, 2}))
    return decoder.load(0), stream


def calibration_with_gradients(block: Block, stream: Stream) -> CalibrationData:
    """Return what the walk collects of a block for Wanda++."""
    needs = wandapp.needs(wandapp.Config())
    return CalibrationData(collect(block, stream, needs)[0], stream)


def quadratic_error(values_OI: Tensor, weight_OI: Tensor, gram_II: Tensor) -> float:
    """Return tr((W − Q)H(W − Q)ᵀ)."""
    missing_OI = weight_OI - values_OI
    return float(((missing_OI @ gram_II) * missing_OI).sum(dtype=torch.float64))
