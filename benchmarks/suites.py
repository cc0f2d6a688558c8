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


def learned() -> list[Case]:
    found = wandas("2:4", "0.5", "0.7") + [case("sparsegpt", target) for target in ("2:4", "0.5", "0.7")]
    found += [case("wandapp", target) for target in ("2:4", "0.5")]
    found += [case("besa", target) for target in ("0.5", "0.7")]
    found += [case("wanda owl", "0.7", "wanda", allocation="owl"), case("besa owl", "0.7", "besa", allocation="owl")]
    for preset in ("fast", "balanced", "best"):
        found += [case(preset, target, preset=preset) for target in ("2:4", "0.5", "0.7")]
    return found


SUITES = {
    "classic": classic(), "learned": learned(),
}
