"""Named recipes: the best chain for each time budget, by the kind of target.

Zeros: chosen from `benchmarks/results/quality/tuning-llama-28m.json`. `fast` is one closed-form pass. `balanced` adds
regional optimization at about the cost of Wanda++. `best` has six times the rounds of `balanced` and longer
steps, in a basis that loses less where the model allows one (docs/log/2026-11-30-another-basis.md). Both count the
logits of the dense model at the last block, which costs next to nothing, unless `blocks` names some blocks alone.

Codes of one width: `fast` is gptq; the others also learn in the block. Other bits do the same with squeeze10, whose
products are fast everywhere. `best` codes them by a trellis: 16 % less perplexity on SmolLM2 at 2.28 bits, and slower
products (docs/log/2026-11-30-learned-trellis.md). An option that names salient columns takes squeeze10 in all presets.

A target of zeros and bits takes the chain for zeros, then gptq. No preset trains the whole model.
"""

from typing import Any

from niwaki.config.targets import CODE_WIDTHS, Bits, PrunedBits, Target, parse_target
from niwaki.errors import InputError, unknown

BITS_OPTION = "salient_frac"  # of a method with fractional bits: the bits follow from it, without a target
_EXCHANGE = {"exchanges": 6}
_LEARN = {"target": "both", "optimizer": "adam", "rate_frac": 0.0075, "kl": 1.0}
_LONG = _LEARN | {"rate_frac": 0.015, "rounds": 30, "samples": 64, "batch": 4}
_GRID = {"group": 64}
_ROUNDS = {"learn_rounds": 8, "kl": 1.0}
_MORE_ROUNDS = {"learn_rounds": 24, "samples": 64, "batch": 4, "kl": 1.0}


def _options(**steps: dict[str, Any]) -> dict[str, Any]:
    return {f"{step}.{name}": value for step, options in steps.items() for name, value in options.items()}


def _recipe(method: str, **steps: dict[str, Any]) -> dict[str, Any]:
    return {"method": method, "options": _options(**steps)}


def _turned(method: str, **steps: dict[str, Any]) -> dict[str, Any]:
    return {**_recipe(method, **steps), "rotate": "auto"}


# {preset: {targets that it is for: recipe}}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "fast": {
        "zeros": _recipe("sparsegpt", sparsegpt=_EXCHANGE),
        "2, 3, 4 or 8 bits": _recipe("gptq", gptq=_GRID),
        "other bits": _recipe("squeeze10", squeeze10={"learn_rounds": 0}),
        "salient columns": _recipe("squeeze10", squeeze10={"learn_rounds": 0}),
        "zeros and bits": _recipe("sparsegpt+gptq", sparsegpt=_EXCHANGE, gptq=_GRID),
    },
    "balanced": {
        "zeros": _recipe(
            "sparsegpt+wandapp", sparsegpt=_EXCHANGE, wandapp=_LEARN | {"rounds": 5, "samples": 32, "batch": 1}
        ),
        "2, 3, 4 or 8 bits": _recipe("gptq", gptq=_GRID | _ROUNDS),
        "other bits": _recipe("squeeze10", squeeze10=_ROUNDS),
        "salient columns": _recipe("squeeze10", squeeze10=_ROUNDS),
        "zeros and bits": _recipe(
            "sparsegpt+wandapp+gptq",
            sparsegpt=_EXCHANGE,
            wandapp=_LEARN | {"rounds": 5, "samples": 32, "batch": 1},
            gptq=_GRID | _ROUNDS,
        ),
    },
    "best": {
        "zeros": _turned("sparsegpt+wandapp", sparsegpt=_EXCHANGE, wandapp=_LONG),
        "2, 3, 4 or 8 bits": _recipe("gptq", gptq=_GRID | _MORE_ROUNDS),
        "other bits": _recipe("trellis", trellis=_MORE_ROUNDS),
        "salient columns": _recipe("squeeze10", squeeze10={"learn_rounds": 16, "samples": 56, "kl": 1.0}),
        "zeros and bits": _turned(
            "sparsegpt+wandapp+gptq",
            sparsegpt=_EXCHANGE,
            wandapp=_LONG,
            gptq=_GRID | _MORE_ROUNDS,
        ),
    },
}


def names_bits(options: Any) -> bool:
    """Return whether one of the options is BITS_OPTION, of any method."""
    return isinstance(options, dict) and any(str(key).rpartition(".")[2] == BITS_OPTION for key in options)


def with_preset(values: dict[str, Any]) -> dict[str, Any]:
    """Return recipe fields with their preset filled in. Options that stand beside the preset win."""
    values = dict(values)
    name = values.pop("preset", None)
    if name is None:
        return values
    if name not in PRESETS:
        raise InputError(unknown("preset", str(name), PRESETS))
    if values.get("method") is not None:
        raise InputError(
            f"preset {name} brings its own method, got method {values['method']} as well: give one of them"
        )
    preset = PRESETS[name][_kind_of(values)]
    own = {key: value for key, value in preset["options"].items() if not (key.endswith(".kl") and values.get("blocks"))}
    options = {**own, **(values.pop("options", None) or {})}
    return {**preset, **values, "method": preset["method"], "options": options}


def _kind_of(values: dict[str, Any]) -> str:
    """Return the kind of the target of a recipe; of bytes it is other bits."""
    target = values.get("target")
    if values.get("target_bytes") is not None:
        return "other bits"
    if names_bits(values.get("options")):
        return "salient columns"
    return "zeros" if target is None else kind_of(parse_target(str(target)))


def kind_of(target: Target) -> str:
    """Return the key of `PRESETS` for a target."""
    if isinstance(target, PrunedBits):
        return "zeros and bits"
    if isinstance(target, Bits):
        return "2, 3, 4 or 8 bits" if target.bits in CODE_WIDTHS else "other bits"
    return "zeros"
