"""A tiny causal model whose blocks get more than their hidden state, in one of several ways.

`token`: ids of the tokens. `flat`: a tensor of windows times heads. `handed`: a list to which every block appends, and
from which later ones read. `stacked`: hidden states [2, B, T, D]. `reads`: ids as well, and blocks that multiply with
the weight of a layer themselves and return a list.

The others cannot be walked. `computed`: an argument made from the output of the block before. `extra`: a second output
that goes on. `changed`: a hidden state that the model changes between blocks. `batch`: an argument that mixes windows.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

WALKED = ("token", "flat", "handed", "stacked", "reads")
REFUSED = ("computed", "extra", "changed", "batch")


class OddConfig(PreTrainedConfig):  # type: ignore[misc]
    """Config of the odd model."""

    model_type = "niwaki-odd"

    def __init__(
        self,
        kind: str = "token",
        hidden_size: int = 16,
        num_hidden_layers: int = 3,
        vocab_size: int = 96,
        **other: Any,
    ) -> None:
        self.kind = kind
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        super().__init__(**other)


class OddBlock(nn.Module):
    """A gated product of every token with the running mean of the tokens before it."""

    def __init__(self, config: OddConfig) -> None:
        super().__init__()
        self.kind = config.kind
        self.up = nn.Linear(config.hidden_size, 2 * config.hidden_size, bias=False)
        self.down = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor, given: Any = None) -> Any:
        x = hidden_states
        x_in = x.cumsum(-2) / 4
        y = nn.functional.linear(x_in, self.up.weight.to(x.dtype)) if self.kind == "reads" else self.up(x_in)
        if self.kind == "handed":
            y = y + sum(given, torch.zeros(()))
            given.append(y.tanh())
        elif self.kind == "flat":
            y = y * given.view(len(x), 2, -1, 1).mean(1)
        elif isinstance(given, Tensor):
            y = y + given.float().unsqueeze(-1) if given.dim() == 2 else y + given.mean()
        x = x + self.down(torch.nn.functional.silu(y))
        if self.kind == "reads":
            return [x]
        return (x, x.mean(-1)) if self.kind == "extra" else x


class OddModel(PreTrainedModel):  # type: ignore[misc]
    """Embeddings, odd blocks and a head."""

    config_class = OddConfig

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([OddBlock(config) for _ in range(config.num_hidden_layers)])
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> Any:
        return self.embed_tokens

    def get_output_embeddings(self) -> Any:
        return self.lm_head

    def forward(self, input_ids: Tensor, use_cache: bool = False, **_: Any) -> Any:
        kind = self.config.kind
        x = self.embed_tokens(input_ids)
        given: Any = {
            "token": input_ids % 7,
            "reads": input_ids % 7,
            "flat": (input_ids % 5).float().repeat_interleave(2, 0),
            "handed": [],
            "batch": input_ids.float().mean() / 50,
        }.get(kind)
        if kind == "stacked":
            x = torch.stack([x, x.flip(-1)])
        for layer in self.layers:
            if kind == "computed":
                given = x.mean(-1).cumsum(1)
            elif kind == "changed":
                x = x * 2
            x = layer(x, given=given)
            if kind == "extra":
                x, given = x
            elif kind == "reads":
                (x,) = x
        return CausalLMOutput(logits=self.lm_head(x.mean(0) if kind == "stacked" else x))


AutoConfig.register("niwaki-odd", OddConfig, exist_ok=True)
AutoModelForCausalLM.register(OddConfig, OddModel, exist_ok=True)
