"""Contextual sparsity: every input runs only the heads and neurons that it needs; the weights stay as they are.

Source: Akhauri et al., "ShadowLLM: Predictor-based Contextual Sparsity for Large Language Models" (2024): one predictor
for the whole model looks at the output of the first attention layer at the last prompt token and says how important
every head and neuron will be. The paper's text could not be read; its released code could, and is not followed where it
cannot be deployed: there the mask of a text is chosen from its last token, and masks of neurons change nothing.

What importance is best depends on the model, so it is tried: the criteria of heads and of neurons are those whose
masks, chosen from prompts as they will be, cost the least loss on calibration windows kept out of the fit.

What is ours: the prompt runs dense, and only tokens already seen choose what runs (`contextual.predictor` has the map,
`contextual.criteria` the importance). Instead of the paper's feature, one token, the predictor reads how active every
unit was in the prompt, and it is a factored linear map, fitted in closed form; GRIFFIN (Dong et al. 2024) and
static masks are its special cases. Deviation: gated neurons are scored at h = act(gate)·up, heads in groups that share
keys.

Cost: learning takes `tracing`, N²·(F + U) operations for N samples, and for the trial the same and a forward of at most
`trial_windows` windows for each of six candidates, one block in memory (`trial`); running reads the prompt with all
weights, then takes one small product and a copy of the weights that stay for every sequence.

    niwaki compress MODEL OUT --method shadow --target 0.5 --calibration mine.txt --samples 256 --seq-len 512
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any

import torch

from niwaki.config.recipe import Sparsity
from niwaki.data.statistics import Needs
from niwaki.errors import InputError
from niwaki.methods.cost import Scope, Work
from niwaki.methods.method import ContextualMethod
from niwaki.runtime.contextual.criteria import CRITERIA
from niwaki.runtime.contextual.predictor import FEATURES, Predictor, fit
from niwaki.runtime.contextual.record import Running
from niwaki.runtime.contextual.selection import SCOPES, SHARING, Rule, Variant
from niwaki.runtime.contextual.traces import Traces
from niwaki.runtime.contextual.units import Layout

NEURON_WIDTHS = (1, 32, 64, 128)
AUTO = "auto"
CANDIDATES = {"head_criterion": ("plainact", "fisher", "energy"), "criterion": ("fisher", "energy", "plainact")}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of contextual sparsity."""

    head_criterion: Annotated[
        str, "Importance of heads: plainact, fisher, energy, or auto for the one that loses least on trial windows."
    ] = AUTO
    criterion: Annotated[
        str, "Importance of neurons: fisher, energy, plainact, or auto for the one that loses least on trial windows."
    ] = AUTO
    trial_windows: Annotated[int, "Windows kept out of the fit, that auto is decided on."] = 32
    features: Annotated[
        str, "Inputs of the predictor, joined by +: last (as in the paper), mean, prompt; none for no learned part."
    ] = "prompt"
    shrinkage: Annotated[bool, "Correct the prediction by the activity in the prompt, shrunk by its noise."] = True
    scope: Annotated[str, "Where units compete: within a block (local) or in the whole model (global)."] = "local"
    floor_frac: Annotated[float, "Min share of the units of a block that run."] = 0.1
    neuron_width: Annotated[int, "Neighboring neurons that go together: 1, 32, 64 or 128."] = 1
    cuts: Annotated[int, "Prompt lengths that each window is cut at."] = 2
    gradient_windows: Annotated[int, "Windows for the mean gradients of energy."] = 64
    size_frac: Annotated[float, "Parameters of the predictor as a share of the decoder's."] = 0.03
    refresh_tokens: Annotated[int, "Tokens between two choices of the units; 0 for one choice, after the prompt."] = 0
    min_prompt: Annotated[int, "Min tokens of a prompt; shorter ones run dense."] = 16
    max_kept_frac: Annotated[float, "Share of the weights above which a batch runs dense."] = 0.85
    batch: Annotated[str, "What the sequences of a batch run: the union of their neurons, or a shared choice."] = (
        "union"
    )
    mean_fill: Annotated[float, "Share of a skipped neuron's mean activation in the prompt that takes its place."] = 0.5
    max_deviation: Annotated[float, "Deviation of a prompt above which it runs dense; 0 for none."] = 0.0
    min_margin: Annotated[float, "Margin of the mask below which a prompt runs dense."] = 0.0

    def __post_init__(self) -> None:
        choices = {
            "head_criterion": (AUTO, *CRITERIA),
            "criterion": (AUTO, *CRITERIA),
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
        if min(self.cuts, self.gradient_windows, self.trial_windows) < 1:
            raise ValueError("expected cuts ≥ 1, gradient_windows ≥ 1 and trial_windows ≥ 1")
        if not (0 <= self.floor_frac < 1 and 0 < self.size_frac < 1):
            raise ValueError("expected floor_frac in [0, 1) and size_frac in (0, 1)")

    def candidates(self, option: str) -> tuple[str, ...]:
        """The criteria that `head_criterion` or `criterion` leaves open."""
        return CANDIDATES[option] if getattr(self, option) == AUTO else (getattr(self, option),)

    @property
    def criteria(self) -> tuple[str, ...]:
        """All that may be used, of heads and of neurons, each once."""
        return tuple(dict.fromkeys(name for option in CANDIDATES for name in self.candidates(option)))

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


def rule(config: Config, skip_frac: float) -> Rule:
    """How scores become the units that run."""
    return Rule(skip_frac, config.scope, config.floor_frac)


Measure = Callable[[Sequence[Variant]], list[float]]


def candidate_rows(windows: int, config: Config) -> range:
    """The windows, the last ones, that trials are held on: at most a quarter of all."""
    return range(windows - max(1, min(config.trial_windows, windows // 4)), windows)


def choose_criterion(
    traces: Mapping[str, Traces],
    layout: Layout,
    config: Config,
    skip_frac: float,
    decoder_weights: int,
    measure: Measure,
) -> tuple[Config, dict[str, Any]]:
    """The options with every `auto` replaced by what loses least, and the losses of all that was tried.

    Predictors learn from the other windows. `measure` gives the loss of variants on those of `candidate_rows`, each
    with the prompt of one of its cuts, in turn. The criterion of heads is chosen first, with the first one of neurons.

    Cost: a fit and a forward of those windows for every candidate.
    """
    windows = len(traces[config.criteria[0]]) // config.cuts
    held = candidate_rows(windows, config)
    rows_S = torch.tensor([window * config.cuts + window % config.cuts for window in held])
    firsts: dict[str, Any] = {option: config.candidates(option)[0] for option in CANDIDATES}
    settled = replace(config, **firsts)
    tried: dict[str, dict[str, float]] = {}

    def variant(choice: Config) -> Variant:
        found = samples(traces, layout, choice)
        train, judge = found.take(slice(0, held.start * config.cuts)), found.take(rows_S)
        predictor, _ = learn(train, layout, choice, decoder_weights)
        scores_SU = predictor.scores(judge.last_ND, judge.mean_ND, judge.prompt_NU)
        return Variant(rule(choice, skip_frac).select(scores_SU, layout), choice.mean_fill)

    for option in CANDIDATES:
        each: dict[str, dict[str, Any]] = {name: {option: name} for name in config.candidates(option)}
        choices = {name: replace(settled, **chosen) for name, chosen in each.items()}
        if len(choices) > 1:
            losses = measure([variant(choice) for choice in choices.values()])
            tried[option] = dict(zip(choices, losses, strict=True))
            settled = choices[min(tried[option], key=lambda name: tried[option][name])]
    return settled, tried


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
    rank = _rank(layout, inputs, config, decoder_weights)
    return fit(traces, layout, config.groups, config.shrinkage, rank)


def cost(scope: Scope, config: Config) -> Work:
    """The trial: a forward of its windows for every candidate."""
    tried = sum(len(found) for found in map(config.candidates, CANDIDATES) if len(found) > 1)
    return Work(forward_tokens=tried * len(candidate_rows(scope.windows, config)) * scope.tokens)


def beside_bytes(layout: Layout, channels: int, windows: int, config: Config, decoder_weights: int) -> int:
    """Bytes of the predictor, float32; `channels`: of the input of the matrix that heads write through.

    The rank may turn out lower, where the samples have fewer directions than that.
    """
    widths = {"last": channels, "mean": channels, "prompt": layout.size}
    inputs = sum(widths[name] for name in config.groups)
    rank = min(_rank(layout, inputs, config, decoder_weights), windows * config.cuts) if inputs else 0
    return 4 * (2 * layout.size + 4 + 2 * inputs + rank * (inputs + layout.size))


def _rank(layout: Layout, inputs: int, config: Config, decoder_weights: int) -> int:
    """The largest that the share of parameters allows."""
    vectors = 2 * layout.size + 2 * inputs + 4
    rank = int((config.size_frac * decoder_weights - vectors) // max(inputs + layout.size, 1))
    if config.groups and rank < 1:
        raise InputError(
            f"a predictor of {config.size_frac:.0%} of {decoder_weights:,} weights has no room for rank 1: raise "
            "size_frac or neuron_width, or read fewer features"
        )
    return rank


METHOD = ContextualMethod(
    doc=__doc__,
    paper="Akhauri et al. 2024, ShadowLLM: Predictor-based Contextual Sparsity (read: the released code)",
    accepts=(Sparsity,),
    config=Config,
    needs=needs,
    cost=cost,
    candidate_rows=candidate_rows,
    choose_criterion=choose_criterion,
    samples=samples,
    learn=learn,
    rule=rule,
    beside_bytes=beside_bytes,
)
