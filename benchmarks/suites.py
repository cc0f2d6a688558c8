"""The cases that quality.py measures, by suite. Every suite of gaps begins with wanda, their zero point."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Case:
    """A recipe with a label that is unique for its target."""

    label: str
    recipe: dict = field(default_factory=dict)


def case(label: str, target: str, method: str = "", **more: object) -> Case:
    return Case(label, {"target": target, "method": method or label, **more})


def wandas(*targets: str) -> list[Case]:
    return [case("wanda", target) for target in targets]


def classic() -> list[Case]:
    found = []
    for target in ("0.5", "0.7", "2:4"):
        found += [case(method, target) for method in ("magnitude", "wanda", "sparsegpt")]
    found += [case(f"{method} owl", "0.7", method, allocation="owl") for method in ("wanda", "sparsegpt")]
    return [*found, case("sparsegpt", "4:8")]


LONG = {"rounds": 30, "samples": 64, "batch": 8, "target": "both"}


def chain(label: str, target: str, method: str, **steps: dict) -> Case:
    options = {f"{name}.{key}": value for name, given in steps.items() for key, value in given.items()}
    return case(label, target, method, options=options)


def tune() -> list[Case]:
    found = wandas("2:4", "0.5", "0.7")
    x = {"exchanges": 3}
    adam = {"optimizer": "adam", "rate_frac": 0.0075}
    half = LONG | adam | {"rounds": 15}
    two = "sparsegpt+wandapp"
    for target in ("2:4", "0.5", "0.7"):
        found += [
            case("sparsegpt", target),
            chain("fast", target, "sparsegpt", sparsegpt=x),
            chain("best", target, two, sparsegpt=x, wandapp=half),
            chain("balanced", target, two, sparsegpt=x, wandapp=adam | {"target": "both"}),
        ]
    for target in ("2:4", "0.5"):
        a = {"optimizer": "adam"}
        for label, options in {
            "adam .0075": a | {"rate_frac": 0.0075}, "adam .015": a | {"rate_frac": 0.015},
            "adam .015 K10": a | {"rate_frac": 0.015, "rounds": 10},
            "adam .025 K10 b2": a | {"rate_frac": 0.025, "rounds": 10, "batch": 2},
            "adam .015 alpha 0": a | {"rate_frac": 0.015, "alpha": 0.0},
            "adam .015 both": a | {"rate_frac": 0.015, "target": "both"},
            "rms .0075": {"rate_frac": 0.0075},
        }.items():
            found.append(case(f"wandapp {label}", target, "wandapp", options=options))
    p = {"balance": "penalty"}
    for target in ("0.5", "0.7"):
        for label, options in {
            "pen": p, "pen seg4": p | {"segments": 4}, "pen seg16": p | {"segments": 16},
            "shift seg8": {"segments": 8}, "pen e16 b2": p | {"epochs": 16, "batch": 2},
            "pen both": p | {"target": "both"}, "pen width .3": p | {"width_frac": 0.3},
        }.items():
            found.append(case(f"besa {label}", target, "besa", options=options))
    found += [case("wanda owl", "0.7", "wanda", allocation="owl")]
    found += [case("besa pen owl", "0.7", "besa", options=p, allocation="owl")]
    return found


SUITES = {
    "classic": classic(), "tune": tune(),
}
