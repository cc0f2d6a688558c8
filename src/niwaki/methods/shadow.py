"""Contextual sparsity: every token reads only the inputs of the matrices that it needs; the weights do not change.

Source: Akhauri et al., "ShadowLLM: Predictor-based Contextual Sparsity for Large Language Models" (2024). One predictor
for the whole model reads a prompt and says which heads and neurons matter, learned from gradients of the loss. The
paper's text could not be read; its released code could.

`unit=inputs` (the default) skips less at once and chooses at every token, as TEAL (Liu et al. 2024) does. Input i of a
matrix is left out if |x_i| is below a threshold. The gradients decide how much each place may leave out. With g the
gradient of the loss at the inputs x, those that are left out change the loss by Σ g·x. Half of the mean square of that
is the damage. The shares of all places follow from these curves under one budget of weights that are not read. A trial
on held-out windows is recorded, and refuses a target that multiplies perplexity by more than `max_ratio`.

`unit=prompt` chooses heads and neurons once for a prompt, by a predictor. The best measure of importance depends on the
model, so candidates are evaluated. Their masks are chosen from prompts, as in use. The criteria that lose least on
calibration windows kept out of the fit are taken, for heads and for neurons.

Differences from the paper: the prompt runs dense, and only earlier tokens choose what runs. In the released code the
mask of a text comes from its last token, and masks of neurons change nothing. The paper's predictor reads one token;
that of `prompt` reads the activity of every unit in the prompt. It is a factored linear map (`contextual.predictor`),
fitted in closed form. GRIFFIN (Dong et al. 2024) and static masks are its special cases. Gated neurons are scored at
h = act(gate)·up, and heads in groups that share keys.

Cost: of `inputs`, a walk backwards over `gradient_windows`, and a forward of 16 windows and of the held-out ones. Of
`prompt`, the traces (a walk backwards) and N²·(F + U) operations for N samples. Each of six candidates takes the same,
and a forward of at most `candidate_windows` windows with one block in memory. Running reads the prompt with all
weights. Then `inputs` compares sizes at every token; with `prompt` every sequence takes one small product and a copy of
the weights that stay.

    niwaki compress MODEL OUT --method shadow --target 0.5 --calibration mine.txt --samples 256 --seq-len 512
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any

import torch

from niwaki.config.targets import Sparsity
from niwaki.data.statistics import Needs
from niwaki.errors import InputError
from niwaki.methods.cost import Scope, Work
from niwaki.methods.method import ContextualMethod
from niwaki.runtime.contextual.criteria import CRITERIA
from niwaki.runtime.contextual.predictor import FEATURES, Predictor, fit
from niwaki.runtime.contextual.predictor_files import Running
from niwaki.runtime.contextual.selection import SCOPES, SHARING, Rule, Variant
from niwaki.runtime.contextual.traces import Traces
from niwaki.runtime.contextual.units import UnitLayout

NEURON_WIDTHS = (1, 32, 64, 128)
THRESHOLD_WINDOWS = 16  # that thresholds of inputs are set on
AUTO = "auto"
INPUTS, PROMPT = "inputs", "prompt"
SIZE, WEIGHTED = "size", "weighted"
OF_PROMPTS = (
    "head_criterion", "criterion", "features", "shrinkage", "floor_frac", "neuron_width", "cuts", "size_frac",
    "max_kept_frac", "batch", "mean_fill", "min_margin",
)  # fmt: skip
CANDIDATES = {"head_criterion": ("plainact", "fisher", "energy"), "criterion": ("fisher", "energy", "plainact")}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of contextual sparsity; `OF_PROMPTS` are for units that are chosen for a prompt."""

    unit: Annotated[
        str, "What is skipped: inputs of matrices, chosen at every token, or heads and neurons, chosen for a prompt."
    ] = INPUTS
    score: Annotated[
        str, "What a threshold is compared with: size of an input, or weighted by the root of its typical gradient."
    ] = SIZE
    max_ratio: Annotated[
        float, "A target of inputs is refused if perplexity on held-out windows rises by more than this factor."
    ] = 2.0
    head_criterion: Annotated[
        str, "Importance of heads: plainact, fisher, energy, or auto for the best one on candidate windows."
    ] = AUTO
    criterion: Annotated[
        str,
        "Importance of neurons: fisher, energy, plainact, or auto for the best one on candidate windows.",
    ] = AUTO
    candidate_windows: Annotated[
        int, "Windows kept out of the fit: criteria are compared on them, and inputs get their trial."
    ] = 32
    features: Annotated[
        str, "Inputs of the predictor, joined by +: last (as in the paper), mean, prompt; none for no learned part."
    ] = "prompt"
    shrinkage: Annotated[bool, "Correct the prediction by the activity in the prompt, shrunk by its noise."] = True
    scope: Annotated[
        str, "Where units compete: within a block (local) or in the whole model (global). auto: global for inputs."
    ] = AUTO
    floor_frac: Annotated[float, "Min share of the units of a block that run."] = 0.1
    neuron_width: Annotated[int, "Neighboring neurons that go together: 1, 32, 64 or 128."] = 1
    cuts: Annotated[int, "Prompt lengths that each window is cut at."] = 2
    gradient_windows: Annotated[int, "Windows for the mean gradients of energy, or for the damage of inputs."] = 64
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
            "unit": (INPUTS, PROMPT),
            "score": (SIZE, WEIGHTED),
            "scope": (AUTO, *SCOPES),
            "batch": SHARING,
            "neuron_width": NEURON_WIDTHS,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {getattr(self, name)!r}")
        if self.features != "none" and not set(self.features.split("+")) <= set(FEATURES):
            all_features = ", ".join(FEATURES)
            raise ValueError(f"features must be none, or some of {all_features} joined by +, got {self.features!r}")
        if min(self.cuts, self.gradient_windows, self.candidate_windows) < 1:
            raise ValueError("expected cuts ≥ 1, gradient_windows ≥ 1 and candidate_windows ≥ 1")
        if self.unit == INPUTS and (odd := [name for name in OF_PROMPTS if getattr(self, name) != _DEFAULTS[name]]):
            raise ValueError(f"{odd[0]} is an option of unit {PROMPT}: leave it out, or set unit={PROMPT}")
        if not self.max_ratio > 1:
            raise ValueError(f"max_ratio must be more than 1, got {self.max_ratio}")
        if not (0 <= self.floor_frac < 1 and 0 < self.size_frac < 1):
            raise ValueError("expected floor_frac in [0, 1) and size_frac in (0, 1)")

    def candidates(self, option: str) -> tuple[str, ...]:
        """Return the criteria that `head_criterion` or `criterion` leaves open."""
        return CANDIDATES[option] if getattr(self, option) == AUTO else (getattr(self, option),)

    @property
    def own_scope(self) -> str:
        """Return where units compete."""
        return self.scope if self.scope != AUTO else "global" if self.unit == INPUTS else "local"

    @property
    def criteria(self) -> tuple[str, ...]:
        """Return all criteria that may be used for heads or neurons, each once."""
        return tuple(dict.fromkeys(name for option in CANDIDATES for name in self.candidates(option)))

    @property
    def running(self) -> dict[str, Any]:
        """Return the fields of `contextual.predictor_files.Running`."""
        found = {entry.name: getattr(self, entry.name) for entry in fields(Running)}
        return found if self.unit == PROMPT else found | {"mean_fill": 0.0}

    @property
    def groups(self) -> tuple[str, ...]:
        """Return the features by name."""
        return () if self.features == "none" else tuple(self.features.split("+"))


_DEFAULTS = {entry.name: entry.default for entry in fields(Config)}


def needs(config: Config) -> Needs:
    """Ask for gradients; the job collects them with everything that predictors learn from."""
    return Needs(gradient=True)


def rule(config: Config, skip_frac: float) -> Rule:
    """Return the rule that turns scores into the units that run."""
    return Rule(skip_frac, config.own_scope, config.floor_frac)


Measure = Callable[[Sequence[Variant]], list[float]]


def candidate_rows(windows: int, config: Config) -> range:
    """Return the windows for the evaluation of candidates: the last ones, at most a quarter of all."""
    return range(windows - max(1, min(config.candidate_windows, windows // 4)), windows)


def choose_criterion(
    traces: Mapping[str, Traces],
    layout: UnitLayout,
    config: Config,
    skip_frac: float,
    decoder_weights: int,
    measure: Measure,
) -> tuple[Config, dict[str, Any]]:
    """Replace every `auto` by the criterion that loses least. Return the options, and the losses of all candidates.

    Predictors learn from the other windows. `measure` gives the loss of variants on those of `candidate_rows`, each
    with the prompt of one of its cuts, in turn. The criterion of heads is chosen first, with the first one of neurons.

    Cost: a fit and a forward of those windows for every candidate.
    """
    windows = len(traces[config.criteria[0]]) // config.cuts
    held = candidate_rows(windows, config)
    rows_S = torch.tensor([window * config.cuts + window % config.cuts for window in held])
    firsts: dict[str, Any] = {option: config.candidates(option)[0] for option in CANDIDATES}
    best = replace(config, **firsts)
    losses_by_option: dict[str, dict[str, float]] = {}

    def variant(candidate: Config) -> Variant:
        joined = samples(traces, layout, candidate)
        train, judge = joined.take(slice(0, held.start * config.cuts)), joined.take(rows_S)
        predictor, _ = learn(train, layout, candidate, decoder_weights)
        scores_SU = predictor.scores(judge.last_ND, judge.mean_ND, judge.prompt_NU)
        return Variant(rule(candidate, skip_frac).select(scores_SU, layout), candidate.mean_fill)

    for option in CANDIDATES:
        changes: dict[str, dict[str, Any]] = {name: {option: name} for name in config.candidates(option)}
        candidates = {name: replace(best, **change) for name, change in changes.items()}
        if len(candidates) > 1:
            losses = dict(zip(candidates, measure([variant(one) for one in candidates.values()]), strict=True))
            losses_by_option[option] = losses
            best = candidates[min(losses, key=lambda name: losses[name])]
    return best, losses_by_option


def samples(traces: Mapping[str, Traces], layout: UnitLayout, config: Config) -> Traces:
    """Join head scores by `head_criterion` with neuron scores by `criterion`; the two kinds are never compared."""
    parts = []
    for kind, criterion in enumerate((config.head_criterion, config.criterion)):
        own = traces[criterion]
        weigh = criterion == "energy"
        parts.append(layout.split(own.score_NU * own.sensitivity_U if weigh else own.score_NU)[kind])
    return replace(traces[config.criterion], score_NU=layout.join(*parts))


def learn(traces: Traces, layout: UnitLayout, config: Config, decoder_weights: int) -> tuple[Predictor, dict[str, Any]]:
    """Fit the map at the largest rank that its share of parameters allows."""
    widths = {"last": traces.last_ND.shape[1], "mean": traces.mean_ND.shape[1], "prompt": layout.size}
    inputs = sum(widths[name] for name in config.groups)
    rank = _rank(layout, inputs, config, decoder_weights)
    return fit(traces, layout, config.groups, config.shrinkage, rank)


def cost(scope: Scope, config: Config) -> Work:
    """Count a forward of the held-out windows for every candidate; of inputs, one with and one without thresholds."""
    if config.unit == INPUTS:
        return Work(forward_tokens=(2 * len(candidate_rows(scope.windows, config)) + THRESHOLD_WINDOWS) * scope.tokens)
    count = sum(len(candidates) for candidates in map(config.candidates, CANDIDATES) if len(candidates) > 1)
    return Work(forward_tokens=count * len(candidate_rows(scope.windows, config)) * scope.tokens)


def beside_bytes(layout: UnitLayout, channels: int, windows: int, config: Config, decoder_weights: int) -> int:
    """Return the bytes of the predictor in float32; `channels`: width of the input of the heads' output matrix.

    The rank is lower if the samples have fewer directions.
    """
    widths = {"last": channels, "mean": channels, "prompt": layout.size}
    inputs = sum(widths[name] for name in config.groups)
    rank = min(_rank(layout, inputs, config, decoder_weights), windows * config.cuts) if inputs else 0
    return 4 * (2 * layout.size + 4 + 2 * inputs + rank * (inputs + layout.size))


def _rank(layout: UnitLayout, inputs: int, config: Config, decoder_weights: int) -> int:
    """Return the largest rank that the share of parameters allows. Raise InputError if that is below 1."""
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
