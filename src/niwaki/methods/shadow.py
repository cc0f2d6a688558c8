"""Contextual sparsity: every input runs only the heads and neurons that it needs; the weights stay as they are.

Source: Akhauri et al., "ShadowLLM: Predictor-based Contextual Sparsity for Large Language Models" (2024): one predictor
for the whole model looks at the output of the first attention layer at the last prompt token and says how important
every head and neuron will be. The paper's text could not be read; its released code could, and is not followed where it
cannot be deployed: there the mask of a text is chosen from its last token, and masks of neurons change nothing.

What is ours: the prompt runs dense, and only tokens already seen choose what runs (`contextual.predictor` has the map,
`contextual.criteria` the importance). Beside the paper's feature the predictor may read the mean over the prompt and
how active every unit was in it, and it is a factored linear map, fitted in closed form; GRIFFIN (Dong et al. 2024) and
static masks are its special cases. Deviation: gated neurons are scored at h = act(gate)·up, heads in groups that share
keys.

Cost: learning takes `tracing` and N²·(F + U) operations for N samples; running reads the prompt with all weights, then
takes one small product and a copy of the weights that stay for every sequence.

    niwaki compress MODEL OUT --method shadow --target 0.5 --calibration mine.txt --samples 256 --seq-len 512
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from niwaki.block import Block
from niwaki.config import Sparsity, Target
from niwaki.contextual.criteria import CRITERIA
from niwaki.contextual.predictor import FEATURES, Predictor, fit
from niwaki.contextual.record import Running
from niwaki.contextual.selection import SCOPES, SHARING, Rule
from niwaki.contextual.traces import Traces
from niwaki.contextual.units import Layout
from niwaki.errors import InputError
from niwaki.packed import Packed
from niwaki.statistics import Needs
from niwaki.stream import Evidence

PAPER = "Akhauri et al. 2024, ShadowLLM: Predictor-based Contextual Sparsity (read: the released code)"
ACCEPTS = (Sparsity,)
CONTINUES = False
NEURON_WIDTHS = (1, 32, 64, 128)


@dataclass(frozen=True, kw_only=True)
class Config:
    """`head_criterion`, `criterion`: what the importance of heads and of neurons is. `features`: what the predictor
    reads, joined by + of last, mean, prompt; none for no learned part. `trust`: whether what the prompt showed of a
    unit corrects what is expected of it.

    `scope`, `floor_frac`: see `contextual.selection`. `neuron_width`: neighbouring neurons that go together. `cuts`:
    prompt lengths a window is cut at. `gradient_windows`: those that give the mean gradients of energy. `size_frac`:
    parameters of the predictor, as a share of the decoder's. The others: see `contextual.record.Running`.
    """

    head_criterion: str = "plainact"
    criterion: str = "fisher"
    features: str = "last+mean+prompt"
    trust: bool = True
    scope: str = "local"
    floor_frac: float = 0.1
    neuron_width: int = 1
    cuts: int = 2
    gradient_windows: int = 64
    size_frac: float = 0.03
    refresh_tokens: int = 0
    least_prompt: int = 16
    most_kept_frac: float = 0.85
    batch: str = "union"
    stand_in: float = 0.5
    most_deviation: float = 0.0
    least_margin: float = 0.0

    def __post_init__(self) -> None:
        choices = {
            "head_criterion": CRITERIA,
            "criterion": CRITERIA,
            "scope": SCOPES,
            "batch": SHARING,
            "neuron_width": NEURON_WIDTHS,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {getattr(self, name)!r}")
        if self.features != "none" and not set(self.features.split("+")) <= set(FEATURES):
            all_features = ", ".join(FEATURES)
            raise ValueError(f"features must be none, or some of {all_features} joined by +, got {self.features!r}")
        if self.cuts < 1 or self.gradient_windows < 1:
            raise ValueError("expected cuts ≥ 1 and gradient_windows ≥ 1")
        if not (0 <= self.floor_frac < 1 and 0 < self.size_frac < 1):
            raise ValueError("expected floor_frac in [0, 1) and size_frac in (0, 1)")

    @property
    def criteria(self) -> tuple[str, ...]:
        """Those of heads and of neurons, each once."""
        return tuple(dict.fromkeys((self.head_criterion, self.criterion)))

    @property
    def running(self) -> dict[str, Any]:
        """The fields of `contextual.record.Running`."""
        return {entry.name: getattr(self, entry.name) for entry in fields(Running)}

    @property
    def groups(self) -> tuple[str, ...]:
        """The features by name."""
        return () if self.features == "none" else tuple(self.features.split("+"))


def needs(config: Config) -> Needs:
    """Gradients, which the job collects with all else that predictors learn from."""
    return Needs(gradient=True)


def compress(
    block: Block,
    seen: Evidence,
    targets: Mapping[str, Target],
    config: Config,
    generator: torch.Generator,
) -> dict[str, Packed]:
    """No matrix changes."""
    return {}


def rule(config: Config, skip_frac: float) -> Rule:
    """How scores become the units that run."""
    return Rule(skip_frac, config.scope, config.floor_frac)


def samples(traces: Mapping[str, Traces], layout: Layout, config: Config) -> Traces:
    """One set of samples from those of every criterion: heads are never compared with neurons, so each has its own."""
    parts = []
    for place, criterion in enumerate((config.head_criterion, config.criterion)):
        found = traces[criterion]
        weigh = criterion == "energy"
        parts.append(layout.split(found.score_NU * found.sensitivity_U if weigh else found.score_NU)[place])
    return replace(traces[config.criterion], score_NU=layout.join(*parts))


def learn(traces: Traces, layout: Layout, config: Config, decoder_weights: int) -> tuple[Predictor, dict[str, Any]]:
    """Fits the map at the largest rank that its share of parameters allows."""
    widths = {"last": traces.last_ND.shape[1], "mean": traces.mean_ND.shape[1], "prompt": layout.size}
    inputs = sum(widths[name] for name in config.groups)
    vectors = 2 * layout.size + 2 * inputs + 4
    rank = int((config.size_frac * decoder_weights - vectors) // max(inputs + layout.size, 1))
    if config.groups and rank < 1:
        raise InputError(
            f"a predictor of {config.size_frac:.0%} of {decoder_weights:,} weights has no room for rank 1: raise "
            "size_frac or neuron_width, or read fewer features"
        )
    return fit(traces, layout, config.groups, config.trust, rank)
