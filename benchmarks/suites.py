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


def tune_wandapp() -> list[Case]:
    found = wandas("2:4", "0.5")
    for target in ("2:4", "0.5"):
        found += [case("wandapp", target)]
        found += [case(f"rate {r}", target, "wandapp", options={"rate_frac": r}) for r in (0.0125, 0.05)]
    return found


def tune_besa() -> list[Case]:
    found = wandas("0.5", "0.7")
    for target in ("0.5", "0.7"):
        for label, options in {
            "besa": {}, "rate .1": {"rate": 0.1}, "rate .4": {"rate": 0.4}, "width .1": {"width_frac": 0.1},
            "epochs 16": {"epochs": 16}, "penalty": {"balance": "penalty"}, "both": {"target": "both"},
            "batch 1": {"batch": 1, "epochs": 4},
        }.items():
            found.append(case(label, target, "besa", options=options))
    return found


def tune_best() -> list[Case]:
    found = wandas("2:4", "0.5", "0.7")
    for target in ("2:4", "0.5", "0.7"):
        x = {"exchanges": 3}
        found += [
            case("sparsegpt", target),
            chain("fast", target, "sparsegpt", sparsegpt=x),
            chain("balanced", target, "sparsegpt+wandapp", sparsegpt=x, wandapp={"target": "both"}),
            chain("best", target, "sparsegpt+wandapp", sparsegpt=x, wandapp=LONG),
            chain("best rate .0125", target, "sparsegpt+wandapp", sparsegpt=x, wandapp=LONG | {"rate_frac": 0.0125}),
        ]
        if target != "2:4":
            found.append(chain("besa first", target, "besa+sparsegpt+wandapp", sparsegpt={"refit": True}, wandapp=LONG))
    return found


SUITES = {
    "classic": classic(), "tune-wandapp": tune_wandapp(), "tune-besa": tune_besa(), "tune-best": tune_best(),
}
