"""Named recipes: the best chain for each time budget, by the kind of target.

Zeros: chosen from `benchmarks/results/quality/tuning-llama-28m.json`. `fast` is one closed-form pass. `balanced` adds
regional optimization at about the cost of Wanda++. `best` has three times the rounds of `balanced`.

Codes of one width: `fast` is gptq; the others also learn in the block. Mixed widths do the same with squeeze10. A
target of zeros and bits takes the chain for zeros, then gptq. No preset trains the whole model.
"""

from typing import Any

from niwaki.config.targets import CODE_WIDTHS, Bits, PrunedBits, Target, parse_target
from niwaki.errors import InputError, unknown

_EXCHANGE = {"exchanges": 6}
_LEARN = {"target": "both", "optimizer": "adam", "rate_frac": 0.0075}
_GRID = {"group": 64}


def _options(**steps: dict[str, Any]) -> dict[str, Any]:
    return {f"{step}.{name}": value for step, options in steps.items() for name, value in options.items()}


def _recipe(method: str, **steps: dict[str, Any]) -> dict[str, Any]:
    return {"method": method, "options": _options(**steps)}


# {preset: {targets that it is for: recipe}}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "fast": {
        "zeros": _recipe("sparsegpt", sparsegpt=_EXCHANGE),
        "2, 3, 4 or 8 bits": _recipe("gptq", gptq=_GRID),
        "other bits": _recipe("squeeze10", squeeze10={"learn_rounds": 0}),
        "zeros and bits": _recipe("sparsegpt+gptq", sparsegpt=_EXCHANGE, gptq=_GRID),
    },
    "balanced": {
        "zeros": _recipe(
            "sparsegpt+wandapp", sparsegpt=_EXCHANGE, wandapp=_LEARN | {"rounds": 5, "samples": 32, "batch": 1}
        ),
        "2, 3, 4 or 8 bits": _recipe("gptq", gptq=_GRID | {"learn_rounds": 8}),
        "other bits": _recipe("squeeze10", squeeze10={"learn_rounds": 8}),
        "zeros and bits": _recipe(
            "sparsegpt+wandapp+gptq",
            sparsegpt=_EXCHANGE,
            wandapp=_LEARN | {"rounds": 5, "samples": 32, "batch": 1},
            gptq=_GRID | {"learn_rounds": 8},
        ),
    },
    "best": {
        "zeros": _recipe(
            "sparsegpt+wandapp", sparsegpt=_EXCHANGE, wandapp=_LEARN | {"rounds": 15, "samples": 64, "batch": 8}
        ),
        "2, 3, 4 or 8 bits": _recipe("gptq", gptq=_GRID | {"learn_rounds": 16, "samples": 64, "batch": 4}),
        "other bits": _recipe("squeeze10", squeeze10={"learn_rounds": 16, "samples": 56}),
        "zeros and bits": _recipe(
            "sparsegpt+wandapp+gptq",
            sparsegpt=_EXCHANGE,
            wandapp=_LEARN | {"rounds": 15, "samples": 64, "batch": 8},
            gptq=_GRID | {"learn_rounds": 16, "samples": 64, "batch": 4},
        ),
    },
}


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
    return {**values, "method": preset["method"], "options": {**preset["options"], **(values.get("options") or {})}}


def _kind_of(values: dict[str, Any]) -> str:
    """Return the kind of the target of a recipe; of bytes it is other bits."""
    if values.get("target_bytes") is not None:
        return "other bits"
    target = values.get("target")
    return "zeros" if target is None else kind_of(parse_target(str(target)))


def kind_of(target: Target) -> str:
    """Return the key of `PRESETS` for a target."""
    if isinstance(target, PrunedBits):
        return "zeros and bits"
    if isinstance(target, Bits):
        return "2, 3, 4 or 8 bits" if target.bits in CODE_WIDTHS else "other bits"
    return "zeros"
