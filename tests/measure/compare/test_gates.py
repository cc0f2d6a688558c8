"""Verdicts on made-up evidence: only what is certain passes, and every failure says why."""

import io
import json
import xml.etree.ElementTree as Xml
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from niwaki.cli.compare import print_comparison
from niwaki.compression.model_card import BEGIN, END
from niwaki.errors import InputError
from niwaki.measure.compare.baseline import beyond, gate_text
from niwaki.measure.compare.gates import (
    LIMITS,
    Gates,
    each_confidence,
    judge,
    judge_comparison,
    load_gates,
    measurements,
)
from niwaki.measure.compare.report_folder import junit
from niwaki.measure.intervals import loss_interval
from niwaki.measure.metrics import METRICS
from niwaki.measure.report.comparison_card import put_comparison
from niwaki.measure.schema import (
    Candidate,
    Comparison,
    ComparisonSettings,
    DataQuality,
    Environment,
    Estimate,
    Model,
    PairedAccuracy,
    Quality,
    Scoring,
    Speed,
    TaskQuality,
    Throughput,
    read_comparison,
)


def estimate(value: float, low: float | None, high: float | None, units: int = 50) -> Estimate:
    return Estimate(value=value, low=low, high=high, units=units)


def model(name: str, nbytes: int) -> Model:
    return Model(
        name=name, source=name, kind="plain", method=None, target=None, recipe=None, architecture="A", blocks=1,
        file_bytes=nbytes, decoder_bytes=nbytes, load_seconds=None, memory=None,
    )  # fmt: skip


def quality(ratio: Estimate, kl: Estimate, agreement: Estimate) -> Quality:
    return Quality(
        tokens=1000, units=ratio.units, unit="document", dense_perplexity=10.0, perplexity=10 * ratio.value,
        perplexity_ratio=ratio, kl=kl, top1_agreement=agreement,
    )  # fmt: skip


def pace(ratio: Estimate) -> Throughput:
    return Throughput(
        tokens=8, dense_tokens_per_s=(1.0,), candidate_tokens_per_s=(1.0,), dense_median=1.0, candidate_median=1.0,
        latency_ratio=ratio,
    )  # fmt: skip


def candidate(**changes: Any) -> Candidate:
    whole = quality(estimate(1.03, 1.01, 1.05), estimate(0.02, 0.015, 0.025), estimate(0.96, 0.95, 0.97))
    answers = PairedAccuracy(
        dense_accuracy=0.5, accuracy=0.49, loss=estimate(0.01, -0.01, 0.03, 400), mcnemar_p=0.5,
        right_to_wrong=(1,), wrong_to_right=(),
    )  # fmt: skip
    given: dict[str, Any] = {
        "model": model("small", 400),
        "scoring": Scoring(how="streamed", first_tokens=0, windows=1, dense_windows=0, skipped_frac=0.0),
        "bytes_ratio": 0.4,
        "data": (DataQuality(data="d.jsonl", whole=whole, domains={}),),
        "tasks": (TaskQuality(task="t.jsonl", questions=400, accuracy=answers, accuracy_norm=answers, flips=()),),
        "speed": Speed(threads=1, prefill=pace(estimate(1.2, 1.1, 1.3, 9)), decode=pace(estimate(0.5, 0.45, 0.55, 9))),
        "generations": (),
        "worst": (),
        "gates": (),
        "passed": None,
    }
    return Candidate(**{**given, **changes})


def comparison(*candidates: Candidate) -> Comparison:
    return Comparison(
        date="2026-01-01T00:00:00+00:00", command="niwaki compare", seconds=1.0, confidence=0.95,
        settings=ComparisonSettings(
            data=("d.jsonl",), tasks=("t.jsonl",), prompts=None, field="text", seq_len=8, max_tokens=None, limit=None,
            rounds=9, prompt_tokens=4, new_tokens=4, seed=0, device="cpu", dtype="float32",
        ),
        environment=Environment(
            machine="m", processor="p", cores=1, memory_bytes=1, accelerator=None, system="s", python="3", versions={}
        ),
        dense=model("dense", 1000), candidates=candidates, gate=None, passed=None,
    )  # fmt: skip


def verdict(gate: str, limit: float, confidence: float = 0.95, **changes: Any) -> tuple[bool, str]:
    found = judge(candidate(**changes), Gates(**{"confidence": confidence, gate: limit}), 0.95)
    assert [one.gate for one in found.gates] == [gate] and found.passed == found.gates[0].passed
    return found.gates[0].passed, found.gates[0].reason


def test_a_value_that_an_old_file_lacks_is_not_measured() -> None:
    data = candidate().data[0]
    old = candidate(data=(data.model_copy(update={"whole": data.whole.model_copy(update={"kl": None})}),))
    assert {one.metric for one in measurements(candidate())} - {one.metric for one in measurements(old)} == {"kl"}
    judged = judge(old, Gates(max_kl=0.1), 0.95)
    assert not judged.passed and judged.gates[0].reason.startswith("not measured: ")


JUDGED = [
    # measured 1.03 up to 1.05: beyond the interval, inside it, below it
    ("max_perplexity_ratio", 1.06, True, "at most 1.05"),
    ("max_perplexity_ratio", 1.04, False, "too few data"),
    ("max_perplexity_ratio", 1.02, False, "measured 1.03, limit 1.02"),
    ("max_kl", 0.026, True, "at most 0.025"),
    ("max_kl", 0.021, False, "too few data"),
    ("min_top1_agreement", 0.94, True, "at least 0.95"),
    ("min_top1_agreement", 0.955, False, "may be down to 0.95"),
    ("min_top1_agreement", 0.97, False, "measured 0.96, limit 0.97"),
    ("max_accuracy_loss", 0.03, True, "at most 0.03"),
    ("max_accuracy_loss", 0.02, False, "more questions"),
    ("max_accuracy_norm_loss", 0.0, False, "measured 0.01, limit 0"),
    ("max_decode_latency_ratio", 0.6, True, "at most 0.55"),
    ("max_decode_latency_ratio", 0.5, False, "more --rounds"),
    ("max_prefill_latency_ratio", 1.0, False, "measured 1.2, limit 1"),
    ("max_bytes", 400, True, "400 keeps 400"),
    ("max_bytes", 399, False, "400 exceeds 399"),
    ("max_bytes_ratio", 0.3, False, "0.4 exceeds 0.3"),
]


@pytest.mark.parametrize(("gate", "limit", "passes", "reason"), JUDGED)
def test_the_far_end_of_the_interval_is_judged(gate: str, limit: float, passes: bool, reason: str) -> None:
    passed, found = verdict(gate, limit)
    assert passed is passes and reason in found


@pytest.mark.parametrize("gate", [name for name in LIMITS if "bytes" not in name])
def test_what_was_not_measured_fails(gate: str) -> None:
    passed, reason = verdict(gate, 0.99, data=(), tasks=(), speed=None)
    assert not passed and reason.startswith("not measured: ") and ("give --" in reason or "leave --" in reason)


def test_too_few_pieces_of_evidence_fail_however_good_they_look() -> None:
    for units, confidence, wanted in ((19, 0.95, False), (20, 0.95, True), (9, 0.9, False), (10, 0.9, True)):
        whole = quality(estimate(1.0, 1.0, 1.0, units), estimate(0, 0, 0, units), estimate(1, 1, 1, units))
        few = (DataQuality(data="d", whole=whole, domains={}),)
        passed, reason = verdict("max_perplexity_ratio", 1.5, confidence, data=few)
        assert passed is wanted
        assert wanted or f"only {units} independent units" in reason
    none = quality(estimate(1.0, None, None, 1), estimate(0, None, None, 1), estimate(1, None, None, 1))
    assert not verdict("max_kl", 1, data=(DataQuality(data="d", whole=none, domains={}),))[0]
    rounds = Speed(threads=1, prefill=pace(estimate(0.1, None, None, 3)), decode=pace(estimate(0.1, None, None, 3)))
    assert verdict("max_decode_latency_ratio", 1, speed=rounds) == (False, "only 3 rounds for 0.95 confidence")


def test_intervals_of_less_confidence_are_no_evidence() -> None:
    passed, reason = verdict("max_perplexity_ratio", 9.0, confidence=0.99)
    assert not passed and "measured at 0.95 confidence, the gate asks for 0.99" in reason


def test_every_file_must_pass() -> None:
    good = candidate().data[0]
    bad = quality(estimate(2.0, 1.9, 2.1), estimate(1, 0.9, 1.1), estimate(0.5, 0.4, 0.6))
    both = candidate(data=(good, DataQuality(data="e.jsonl", whole=bad, domains={})))
    found = judge(both, Gates(max_perplexity_ratio=1.1), 0.95)
    assert [(one.about, one.passed) for one in found.gates] == [("d.jsonl", True), ("e.jsonl", False)]
    assert found.passed is False
    one_bad = judge_comparison(comparison(candidate(), both), Gates(max_perplexity_ratio=1.1))
    assert [one.passed for one in one_bad.candidates] == [True, False] and one_bad.passed is False


def test_gates_are_named_after_metrics_and_every_metric_has_one() -> None:
    gates = [name.partition("_") for name in LIMITS]
    assert [metric for _, _, metric in gates] == list(METRICS)
    assert all(METRICS[metric].limit == side for side, _, metric in gates)
    assert {one.metric for one in measurements(candidate())} == set(METRICS)


WRONG = [
    ("max_perplexity: 1.1", "unknown gate 'max_perplexity': did you mean 'max_perplexity_ratio'"),
    ("max_kl: -1", "max_kl: Input should be greater than 0 (got -1)"),
    ("max_kl: .nan", "finite"),
    ("max_kl: true", "max_kl"),
    ("max_kl: 'a'", "max_kl"),
    ("max_kl:", "max_kl: expected a number, got nothing"),
    ("max_bytes: many", "expected a number of bytes"),
    ("confidence: 0.95", "holds no gate: choose from max_perplexity_ratio"),
    ("confidence: 1\nmax_kl: 1", "confidence"),
    ("- max_kl", "expected gates"),
    ("max_kl: [", "is not YAML"),
    ("", "expected gates"),
]


@pytest.mark.parametrize(("content", "message"), WRONG)
def test_wrong_gate_files_are_one_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "gate.yaml"
    path.write_text(content)
    with pytest.raises(InputError) as raised:
        load_gates(path)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_bytes_may_have_a_unit(tmp_path: Path) -> None:
    path = tmp_path / "gate.yaml"
    path.write_text("max_bytes: 1.5MB\nmax_kl: 1\n")
    assert load_gates(path).limits == {"max_kl": 1.0, "max_bytes": 1.5e6}


@pytest.mark.parametrize("margin", [0.0, 0.1, 1.0])
def test_a_baseline_passes_the_gates_written_from_it(tmp_path: Path, margin: float) -> None:
    path = tmp_path / "gate.yaml"
    baseline = comparison(candidate())
    path.write_text(gate_text(baseline, margin=margin))
    gates = load_gates(path)
    assert set(gates.limits) == set(LIMITS)
    assert judge_comparison(baseline, gates).passed is True
    if margin == 0.1:
        assert gates.max_perplexity_ratio == 1.055  # 1.05, and a tenth of its distance from 1
        assert gates.max_kl == 0.0275 and gates.max_bytes == 440 and gates.min_top1_agreement == 0.945
    worse = quality(estimate(1.2, 1.15, 1.25), estimate(0.2, 0.1, 0.3), estimate(0.8, 0.7, 0.9))
    later = comparison(candidate(data=(DataQuality(data="d.jsonl", whole=worse, domains={}),)))
    assert judge_comparison(later, gates).passed is False


def test_a_baseline_without_evidence_writes_comments(tmp_path: Path) -> None:
    path = tmp_path / "gate.yaml"
    whole = quality(estimate(1.0, 1.0, 1.0, 5), estimate(0, 0, 0, 5), estimate(1, 1, 1, 5))  # 0 and 1 are no limits
    few = candidate(data=(DataQuality(data="d", whole=whole, domains={}),), tasks=(), speed=None)
    text = gate_text(comparison(few))
    path.write_text(text)
    assert set(load_gates(path).limits) == {"max_bytes", "max_bytes_ratio"}
    assert text.count("has too few data") == 1 and text.count("is not a limit") == 2 and text.count("not measured") == 4


def test_a_busy_machine_gives_no_limits_of_speed_and_is_told_of(tmp_path: Path) -> None:
    """Rounds of the dense model that differ 4 times: its intervals are as wide as what else the machine did."""
    path, steady = tmp_path / "gate.yaml", pace(estimate(0.5, 0.45, 0.55, 9))
    busy = pace(estimate(1.2, 0.6, 4.1, 9)).model_copy(update={"dense_tokens_per_s": (10.0, 40.0, 25.0)})
    found = comparison(candidate(speed=Speed(threads=1, prefill=busy, decode=steady)))
    text = gate_text(found)
    path.write_text(text)
    assert "max_decode_latency_ratio" in load_gates(path).limits
    assert "max_prefill_latency_ratio" not in load_gates(path).limits
    assert "# max_prefill_latency_ratio:  (rounds of the dense model differed by a factor of 4: a busy machine)" in text
    for speed, said in ((busy, True), (steady, False)):
        console = Console(width=200, record=True, file=io.StringIO())
        print_comparison(console, comparison(candidate(speed=Speed(threads=1, prefill=speed, decode=steady))))
        assert ("rounds of the dense model alone differed by a factor of 4" in console.export_text()) is said
    (tmp_path / "niwaki").mkdir()
    (tmp_path / "niwaki/run.json").write_text("{}")
    (tmp_path / "README.md").write_text(f"---\nlicense: mit\n---\n{BEGIN}\n{END}\n")
    put_comparison(tmp_path, found, found.candidates[0])
    rows = {line.split(" | ")[1]: line for line in (tmp_path / "README.md").read_text().splitlines() if "| " in line}
    assert "a busy machine: rounds of the dense model differed by a factor of 4" in rows["prefill, tokens/s"]
    assert "busy" not in rows["decode, tokens/s"]


def test_a_tiny_limit_stays_a_number(tmp_path: Path) -> None:
    path = tmp_path / "gate.yaml"
    whole = quality(estimate(1, 0.9, 1.1), estimate(1e-6, 5e-7, 2.34567e-6), estimate(0.9, 0.8, 0.95))
    path.write_text(gate_text(comparison(candidate(data=(DataQuality(data="d", whole=whole, domains={}),)))))
    assert load_gates(path).max_kl == pytest.approx(2.581e-6)


def test_wrong_baselines(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        read_comparison(tmp_path / "no.json")
    (tmp_path / "x.json").write_text('{"format": 2}')
    with pytest.raises(InputError, match="is not a comparison of this niwaki"):
        read_comparison(tmp_path / "x.json")
    two = comparison(candidate(), candidate(model=model("other", 1)))
    with pytest.raises(InputError, match=r"choose one with --candidate \(small, other\)"):
        gate_text(two)
    with pytest.raises(InputError, match="did you mean 'small'"):
        gate_text(two, "smal")
    with pytest.raises(InputError, match="margin must be 0 or more"):
        gate_text(two, "small", margin=-1)
    assert "max_bytes: 2\n" in gate_text(two, "other")


def test_junit_has_a_suite_for_a_candidate_and_a_case_for_a_gate() -> None:
    gates = Gates(max_perplexity_ratio=1.1, max_kl=0.01)
    root = Xml.fromstring(junit(judge_comparison(comparison(candidate(), candidate(model=model("a<&b", 1))), gates)))
    suites = root.findall("testsuite")
    assert [suite.get("name") for suite in suites] == ["small", "a<&b"]
    for suite in suites:
        assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("2", "1", "0")
        first, second = suite.findall("testcase")
        assert first.get("name") == "max_perplexity_ratio d.jsonl" and first.find("failure") is None
        failure = second.find("failure")
        assert failure is not None and failure.get("message") == "measured 0.02, limit 0.01"


def test_junit_without_gates_skips_and_says_so() -> None:
    suite = Xml.fromstring(junit(comparison(candidate()))).find("testsuite")
    assert suite is not None and (suite.get("tests"), suite.get("skipped")) == ("1", "1")
    skipped = suite.find("testcase/skipped")
    assert skipped is not None and "no gates given" in str(skipped.get("message"))


def test_a_comparison_survives_json() -> None:
    found = judge_comparison(comparison(candidate()), Gates(max_kl=1))
    assert Comparison.model_validate_json(found.model_dump_json()) == found
    assert json.loads(found.model_dump_json())["gate"] == {"confidence": 0.95, "max_kl": 1.0}


def test_a_correction_divides_what_is_left_to_chance_by_the_verdicts_from_intervals() -> None:
    limits = {"max_kl": 0.1, "max_accuracy_loss": 0.1, "max_decode_latency_ratio": 2.0, "max_bytes": 1000.0}
    plain, corrected = Gates(**limits), Gates(correction="bonferroni", **limits)
    settings = comparison().settings.model_copy(update={"data": ("a", "b")})
    assert each_confidence(plain, settings, 3) == 0.95
    assert each_confidence(corrected, settings, 3) == pytest.approx(1 - 0.05 / 12)
    assert each_confidence(Gates(correction="bonferroni", max_bytes=1.0), settings, 3) == 0.95


def test_a_correction_needs_intervals_that_were_made_for_it() -> None:
    """Those of a comparison without it are too narrow: a failure that says so, never a pass."""
    gates = Gates(correction="bonferroni", max_kl=0.1, max_perplexity_ratio=1.1)
    found = judge_comparison(comparison(candidate()), gates)
    assert not found.passed
    assert found.gate is not None and found.gate["each_confidence"] == pytest.approx(0.975)
    assert all("compare again with this gate" in verdict.reason for verdict in found.candidates[0].gates)
    wide = comparison(candidate()).model_copy(update={"confidence": 0.975})
    assert judge_comparison(wide, gates).passed


@pytest.mark.parametrize(("correction", "least", "most"), [("none", 0.08, 0.25), ("bonferroni", 0.0, 0.045)])
def test_of_six_limits_that_are_just_broken_none_passes_by_chance(correction: Any, least: float, most: float) -> None:
    """Every task truly loses what the limit allows: a pass is a false alarm, and 2.5 % of comparisons may have one."""
    rng, tasks, questions, comparisons = np.random.default_rng(0), 6, 1000, 300
    gates = Gates(correction=correction, max_accuracy_loss=0.02)
    each = each_confidence(gates, comparison().settings.model_copy(update={"tasks": ("t",) * tasks}), 1)
    wrong = 0
    for _ in range(comparisons):
        found = []
        for lost, won, _ in rng.multinomial(questions, (0.06, 0.04, 0.9), size=tasks):
            loss = estimate(*loss_interval(int(lost), int(won), questions, each, rng), questions)
            answers = PairedAccuracy(
                dense_accuracy=0.5, accuracy=0.5, loss=loss, mcnemar_p=1.0, right_to_wrong=(), wrong_to_right=()
            )
            found.append(TaskQuality(task="t", questions=questions, accuracy=answers, accuracy_norm=answers, flips=()))
        verdicts = judge(candidate(tasks=tuple(found)), gates, each, each).gates
        wrong += any(verdict.passed for verdict in verdicts)
    assert least <= wrong / comparisons <= most


@pytest.mark.parametrize("limit", ["max", "min"])
@pytest.mark.parametrize("name", list(METRICS))
def test_the_table_decides_on_which_side_a_margin_lies(name: str, limit: Any) -> None:
    metric = replace(METRICS[name], limit=limit)
    end = metric.no_difference + 0.5
    assert beyond(metric, end, 0.0) == end
    assert (beyond(metric, end, 0.1) > end) is (limit == "max")
