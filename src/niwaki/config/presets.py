"""Named recipes: the best chain for each time budget, chosen from `benchmarks/results/quality/tuning-llama-28m.json`.

`fast` is one closed-form pass. `balanced` adds regional optimization at about the cost of Wanda++. `best` has three
times the rounds of `balanced`. No preset trains the whole model.
"""

from typing import Any

from niwaki.errors import InputError, unknown

_EXCHANGE = {"exchanges": 6}
_LEARN = {"target": "both", "optimizer": "adam", "rate_frac": 0.0075}


def _options(**steps: dict[str, Any]) -> dict[str, Any]:
    return {f"{step}.{name}": value for step, options in steps.items() for name, value in options.items()}


PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"method": "sparsegpt", "options": _options(sparsegpt=_EXCHANGE)},
    "balanced": {
        "method": "sparsegpt+wandapp",
        "options": _options(sparsegpt=_EXCHANGE, wandapp=_LEARN | {"rounds": 5, "samples": 32, "batch": 1}),
    },
    "best": {
        "method": "sparsegpt+wandapp",
        "options": _options(sparsegpt=_EXCHANGE, wandapp=_LEARN | {"rounds": 15, "samples": 64, "batch": 8}),
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
    preset = PRESETS[name]
    return {**values, "method": preset["method"], "options": {**preset["options"], **(values.get("options") or {})}}
