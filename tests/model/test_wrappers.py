"""Decoders inside wrappers: which blocks are found, which parts stay untouched, and the forward on text alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from niwaki.errors import ArchitectureError
from niwaki.model.anatomy import find_blocks
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.decoder import Decoder
from niwaki.model.hf import auto_class, build_skeleton
from support.wrappers import TEXT, wrappers, write

CPU = torch.device("cpu")
IDS = torch.randint(1, 90, (2, 17), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=sorted(wrappers()))
def wrapper(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, write(wrappers()[request.param], tmp_path_factory.mktemp(request.param))


def test_the_blocks_of_text_are_found_and_run_as_the_wrapper_runs_them(wrapper: tuple[str, Path]) -> None:
    name, folder = wrapper
    decoder = Decoder(Checkpoint.open(folder), CPU)
    assert len(decoder) == TEXT["num_hidden_layers"]
    x_BTD, calls = decoder.embed(IDS)
    for index in range(len(decoder)):
        block = decoder.load(index)
        x_BTD = block.run(calls[index], x_BTD)
        block.release()
    logits_BTV = decoder.logits(IDS, x_BTD)
    model = auto_class(decoder.checkpoint.config).from_pretrained(folder)
    assert type(model).__name__ == decoder.checkpoint.config.architectures[0] == type(decoder.model).__name__
    with torch.no_grad():
        wanted_BTV = model(IDS, use_cache=False).logits
    if name.endswith("moe"):  # the model's own default sums experts with another kernel
        torch.testing.assert_close(logits_BTV, wanted_BTV, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(logits_BTV, wanted_BTV)


def test_towers_are_found_and_never_read(wrapper: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor belongs to a block, to the outer modules or to a tower, and a tower has no memory."""
    _, folder = wrapper
    decoder = Decoder(Checkpoint.open(folder), CPU)
    towers = decoder.tower_names
    parts = [name for index in (None, *range(len(decoder))) for name in decoder.disk_names(index)]
    assert sorted(parts + towers) == sorted(load_file(folder / "model.safetensors"))
    assert towers and not any("lm_head" in name or "embed_tokens" in name for name in towers)
    assert all(".layers." not in decoder.names.parameters[name] for name in decoder.disk_names(None))
    decoder.embed(IDS)
    tower = decoder.model.get_submodule(decoder.anatomy.idle[0])
    assert all(parameter.is_meta for parameter in tower.parameters())


@pytest.mark.parametrize(
    "architectures, kind",
    [
        (["Qwen3_5ForConditionalGeneration"], "AutoModelForImageTextToText"),
        (["Qwen3_5ForCausalLM"], "AutoModelForCausalLM"),
        (None, "AutoModelForCausalLM"),
    ],
)
def test_architectures_choose_between_decoder_and_wrapper(architectures: list[str] | None, kind: str) -> None:
    assert auto_class(transformers.Qwen3_5Config(architectures=architectures)).__name__ == kind


def test_an_encoder_with_a_decoder_is_refused() -> None:
    with pytest.raises(ArchitectureError, match="'udop' is an encoder with a decoder"):
        build_skeleton(transformers.UdopConfig(), torch.float32)


def test_two_decoders_of_one_length_are_refused_by_name() -> None:
    """The config of the text model fits both lists, and so does its number of layers."""

    class Two(transformers.PreTrainedModel):
        config_class = transformers.LlavaConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.first = transformers.LlamaModel(config.text_config)
            self.second = transformers.LlamaModel(config.text_config)

    skeleton: nn.Module = Two(wrappers()["llava"])
    with pytest.raises(ArchitectureError, match=r"first\.layers \(2 layers\), second\.layers \(2 layers\)"):
        find_blocks(skeleton)
