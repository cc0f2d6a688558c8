"""Gate files from a measured baseline: every limit lies a margin beyond the end of the measured interval.

A later build that is as good as the baseline passes, and one that is clearly worse fails. A gate for which the baseline
has too few data becomes a comment.

    write_text(Path("gate.yaml"), gate_text(read_comparison("report/compare.json"), "four", margin=0.1))
"""

import math

from pydantic import ValidationError

from niwaki.errors import InputError, unknown
from niwaki.measure.compare.gates import LIMITS, Gates, judge, measurements, shown
from niwaki.measure.metrics import METRICS, Metric
from niwaki.measure.schema import BUSY_SPREAD, Candidate, Comparison

MARGIN = 0.1


def select_candidate(comparison: Comparison, name: str) -> Comparison:
    """Return the comparison with one of its candidates. Raises InputError for an unknown name."""
    return comparison.model_copy(update={"candidates": (_named(comparison, name),)})


def gate_text(comparison: Comparison, name: str | None = None, margin: float = MARGIN) -> str:
    """Return a commented gate file from the candidate `name` (required if there are several).

    `margin`: added share of the distance from no difference (ratio 1, KL 0, agreement 1, loss 0; for bytes, of the
    value). Raises InputError for an unknown candidate or a margin below 0.
    """
    if margin < 0:
        raise InputError(f"margin must be 0 or more, got {margin:g}")
    candidate = _named(comparison, name)
    lines = [
        f"# Gates from the baseline {candidate.model.name} against {comparison.dense.name} ({comparison.date}).",
        f"# A limit is the end of the interval plus {margin:.0%} of its distance from no difference (for bytes: of the",
        "# value). Missing or too few data fail a gate.",
        f"confidence: {comparison.confidence:g}  # of every interval, two-sided",
    ]
    for gate in LIMITS:
        metric = METRICS[gate.partition("_")[2]]
        unit = f", {metric.unit}" if metric.unit else ""
        lines += ["", f"# {gate}: {metric.meaning}{unit}", *_lines(gate, candidate, comparison.confidence, margin)]
    return "\n".join(lines) + "\n"


def _lines(gate: str, candidate: Candidate, confidence: float, margin: float) -> list[str]:
    name = gate.partition("_")[2]
    throughput = None if candidate.speed is None else candidate.speed.throughputs.get(name)
    if throughput is not None and throughput.dense_spread > BUSY_SPREAD:
        spread = f"rounds of the dense model differed by a factor of {throughput.dense_spread:.0f}"
        return [f"# {gate}:  ({spread}: a busy machine)"]
    own = [one for one in measurements(candidate) if one.metric == name]
    if not own:
        return [f"# {gate}:  (not measured in the baseline)"]
    metric, lines, limits = METRICS[name], [], []
    upper = metric.limit == "max"
    for one in own:
        estimate = one.estimate
        ends = "" if one.exact or estimate.low is None or estimate.high is None else (
            f", {shown(estimate.low)} to {shown(estimate.high)} from {estimate.units} units"
        )  # fmt: skip
        lines.append(f"# measured {shown(estimate.value)}{ends}" + (f" ({one.about})" if one.about else ""))
        end = estimate.high if upper else estimate.low
        limits.append(math.nan if end is None else beyond(metric, end, margin))
    text = _rounded(max(limits) if upper else min(limits), upper, whole=metric.form == "bytes")
    try:
        gates = Gates.model_validate({"confidence": confidence, gate: float(text)})
    except ValidationError:
        return [*lines, f"# {gate}:  (the baseline would give {text}, which is not a limit)"]
    if not judge(candidate, gates, confidence).passed:
        return [*lines, f"# {gate}:  (the baseline has too few data for it)"]
    return [*lines, f"{gate}: {text}"]


def beyond(metric: Metric, end: float, margin: float) -> float:
    """Return the limit that lies `margin` beyond the end of an interval, on the side that the gate limits."""
    distance = abs(end - metric.no_difference) * margin
    return end + distance if metric.limit == "max" else end - distance


def _rounded(value: float, upwards: bool, whole: bool) -> str:
    """Round to four significant digits (bytes: whole), away from the baseline, without an exponent (no 1e-05)."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    digits = 0 if whole else max(0, 3 - math.floor(math.log10(abs(value))))
    rounded = (math.ceil if upwards else math.floor)(round(value * 10**digits, 6)) / 10**digits
    return f"{rounded:.{digits}f}"


def _named(comparison: Comparison, name: str | None) -> Candidate:
    names = [candidate.model.name for candidate in comparison.candidates]
    if name is None and len(names) > 1:
        raise InputError(f"{len(names)} candidates in the baseline: choose one with --candidate ({', '.join(names)})")
    if name is not None and name not in names:
        raise InputError(unknown("candidate", name, names))
    return comparison.candidates[0 if name is None else names.index(name)]
