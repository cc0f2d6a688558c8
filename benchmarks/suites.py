"""The cases that quality.py measures, by suite. Every suite of gaps begins with wanda, their zero point."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Case:
    """A recipe with a label that is unique for its target."""

    label: str
    recipe: dict = field(default_factory=dict)


def case(label: str, target: str, method: str = "", **more: object) -> Case:
    by = {} if "preset" in more else {"method": method or label}
    return Case(label, {"target": target, **by, **more})


def wandas(*targets: str) -> list[Case]:
    return [case("wanda", target) for target in targets]


def classic() -> list[Case]:
    found = []
    for target in ("0.5", "0.7", "2:4"):
        found += [case(method, target) for method in ("magnitude", "wanda", "sparsegpt")]
    found += [case(f"{method} owl", "0.7", method, allocation="owl") for method in ("wanda", "sparsegpt")]
    return [*found, case("sparsegpt", "4:8")]


def chain(label: str, target: str, method: str, **steps: dict) -> Case:
    options = {f"{name}.{key}": value for name, given in steps.items() for key, value in given.items()}
    return case(label, target, method, options=options)


def learned() -> list[Case]:
    found = wandas("2:4", "0.5", "0.7") + [case("sparsegpt", target) for target in ("2:4", "0.5", "0.7")]
    found += [case("wandapp", target) for target in ("2:4", "0.5")]
    found += [case("besa", target) for target in ("0.5", "0.7")]
    found += [case("wanda owl", "0.7", "wanda", allocation="owl"), case("besa owl", "0.7", "besa", allocation="owl")]
    for preset in ("fast", "balanced", "best"):
        found += [case(preset, target, preset=preset) for target in ("2:4", "0.5", "0.7")]
    return found


def varied(method: str, target: str, variants: dict[str, dict]) -> list[Case]:
    return [case(f"{method} {label}".strip(), target, method, options=options) for label, options in variants.items()]


def ablation_wandapp() -> list[Case]:
    """Score, mask, rate, rounds, target; `as published` keeps every published choice that is known."""
    published = {"alpha": 100.0, "rounds": 5, "batch": 1, "optimizer": "rmsprop", "rate_frac": 1e-5}
    found = wandas("2:4", "0.5")
    for target in ("2:4", "0.5"):
        found += varied("wandapp", target, {
            "": {}, "as published": published | {"enforce_mask": False},
            "score alone": {"rounds": 0}, "score alone alpha 0.1": {"rounds": 0, "alpha": 0.1},
            "score alone alpha 10": {"rounds": 0, "alpha": 10.0},
            "score alone alpha 100": {"rounds": 0, "alpha": 100.0},
            "alpha 0": {"alpha": 0.0}, "alpha 100": {"alpha": 100.0}, "mask free": {"enforce_mask": False},
            "rmsprop": {"optimizer": "rmsprop", "rate_frac": 0.0125},
            "rate .0125": {"rate_frac": 0.0125}, "rate .05": {"rate_frac": 0.05},
            "K 5": {"rounds": 5}, "K 20": {"rounds": 20}, "dense": {"target": "dense"}, "both": {"target": "both"},
        })
    return found


def ablation_besa() -> list[Case]:
    found = wandas("0.5", "0.7")
    for target in ("0.5", "0.7"):
        found += varied("besa", target, {
            "": {}, "layer": {"granularity": "layer"}, "dense": {"target": "dense"}, "both": {"target": "both"},
            "shift": {"balance": "shift"}, "segments 4": {"segments": 4},
            "steps 128 batch 2": {"steps": 128, "batch": 2}, "steps 512 batch 2": {"steps": 512, "batch": 2},
            "width .1": {"width_frac": 0.1}, "rate .1": {"rate": 0.1}, "rate .4": {"rate": 0.4},
            "4 bit": {"quant_bits": 4}, "4 bit groups of 128": {"quant_bits": 4, "quant_group": 128},
        })
        for spread in (0.02, 0.04, 0.06):
            options = {"owl_spread_frac": spread}
            found.append(case(f"besa owl {spread}", target, "besa", allocation="owl", options=options))
        found.append(chain("besa, refit", target, "besa+sparsegpt", sparsegpt={"refit": True}))
        found.append(case("besa+wandapp", target))
        learn = {"target": "both", "rate_frac": 0.0075, "rounds": 15, "samples": 64, "batch": 8}
        three = "besa+sparsegpt+wandapp"
        found.append(chain("besa, refit, learn", target, three, sparsegpt={"refit": True}, wandapp=learn))
    return found


SUITES = {
    "classic": classic(),
    "learned": learned(),
    "ablation-wandapp": ablation_wandapp(),
    "ablation-besa": ablation_besa(),
}
