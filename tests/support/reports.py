"""Synthetic comparison with everything that a report can show, and the lines of its compressions."""

from typing import Any

from niwaki.compression.run_record import MatrixRecord
from niwaki.measure.report.layers import Layers, layers_of
from niwaki.measure.schema import (
    Candidate,
    Comparison,
    ComparisonSettings,
    DataQuality,
    Environment,
    Estimate,
    Example,
    Flip,
    Generation,
    Memory,
    Model,
    PairedAccuracy,
    Quality,
    Scoring,
    Speed,
    TaskQuality,
    Throughput,
    TokenDivergence,
    Verdict,
)

EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)>'
DATA, TASK = "texts/mine.jsonl", "questions.jsonl"


def estimate(value: float, low: float | None, high: float | None, units: int = 40) -> Estimate:
    return Estimate(value=value, low=low, high=high, units=units)


def model(name: str, file_bytes: int, **changes: Any) -> Model:
    memory = Memory(
        before_bytes=1, loaded_bytes=2, peak_bytes=3_000_000, device_loaded_bytes=None, device_peak_bytes=None
    )
    about: dict[str, Any] = {
        "name": name, "source": f"made/{name}", "kind": "packed", "method": "gptq", "target": "4bit",
        "recipe": {"method": "gptq", "note": EVIL}, "architecture": "LlamaForCausalLM", "blocks": 3,
        "file_bytes": file_bytes, "decoder_bytes": file_bytes, "load_seconds": 0.5, "memory": memory,
    }  # fmt: skip
    return Model(**{**about, **changes})


def quality(ratio: float, tokens: int = 2000) -> Quality:
    return Quality(
        tokens=tokens, units=40, unit="document", dense_perplexity=10.0, perplexity=10 * ratio,
        perplexity_ratio=estimate(ratio, ratio - 0.01, ratio + 0.01), kl=estimate(0.08, 0.07, 0.09),
        top1_agreement=estimate(0.85, 0.84, 0.86),
    )  # fmt: skip


def pace(ratio: Estimate) -> Throughput:
    return Throughput(
        tokens=32, dense_tokens_per_s=(100.0,) * 9, candidate_tokens_per_s=(100 / ratio.value,) * 9, dense_median=100.0,
        candidate_median=100 / ratio.value, latency_ratio=ratio,
    )  # fmt: skip


def task(loss: float) -> TaskQuality:
    answers = PairedAccuracy(
        dense_accuracy=0.5, accuracy=0.5 - loss, loss=estimate(loss, loss - 0.05, loss + 0.05), mcnemar_p=0.25,
        right_to_wrong=(3, 7), wrong_to_right=(9,),
    )  # fmt: skip
    flips = (
        Flip(question=3, context=f"Which?{EVIL}", right=" soft", dense=" soft", candidate=" hard"),
        Flip(question=9, context="Why?", right=" yes", dense=" no", candidate=" yes"),
    )
    return TaskQuality(task=TASK, questions=40, accuracy=answers, accuracy_norm=answers, flips=flips)


def generation(differs: bool) -> Generation:
    own = (" a", " new", " text") if differs else (" a", " b", " c")
    return Generation(
        prompt=f"Once{EVIL}", dense=(" a", " b", " c"), candidate=own, dense_text=" a b c", candidate_text="".join(own),
        diverges_at=1 if differs else None,
    )  # fmt: skip


def example(number: int) -> Example:
    tokens = tuple(
        TokenDivergence(token=token, kl=kl, dense_top1="x", candidate_top1=top, dense_nll=0.1, candidate_nll=3.0)
        for token, kl, top in ((EVIL, 0.05, "x"), (" b", 0.5, "y"), ("\n", 2.5, "z"))
    )
    return Example(data=DATA, domain="law", before="before", kl=1.0 / number, tokens=tokens)


def verdict(
    gate: str, limit: float, measured: float | None, bound: float | None, passed: bool, about: str = ""
) -> Verdict:
    return Verdict(
        gate=gate, about=about, limit=limit, measured=measured, bound=bound, confidence=0.95, passed=passed,
        reason="told in English",
    )  # fmt: skip


def candidate(name: str, ratio: float, **changes: Any) -> Candidate:
    found: dict[str, Any] = {
        "model": model(name, 4_000_000),
        "scoring": Scoring(how="streamed", first_tokens=0, windows=40, dense_windows=0, skipped_frac=0.0),
        "bytes_ratio": 0.4,
        "data": (
            DataQuality(data=DATA, whole=quality(ratio), domains={"law": quality(ratio + 0.1), "chat": quality(ratio)}),
        ),
        "tasks": (task(0.02),),
        "speed": Speed(threads=1, prefill=pace(estimate(0.5, 0.4, 0.8)), decode=pace(estimate(0.8, 0.7, 1.1))),
        "generations": (generation(True), generation(False).model_copy(update={"prompt": "Twice"})),
        "worst": (example(1), example(2)),
        "gates": (
            verdict("max_perplexity_ratio", 1.1, ratio, ratio + 0.01, ratio < 1.09, DATA),
            verdict("max_bytes", 5e6, 4e6, 4e6, True),
        ),
        "passed": ratio < 1.09,
    }
    return Candidate(**{**found, **changes})


def comparison(*candidates: Candidate, **changes: Any) -> Comparison:
    candidates = candidates or (candidate("four", 1.05), candidate(f"evil{EVIL}", 1.4))
    settings = ComparisonSettings(
        data=(DATA,), tasks=(TASK,), prompts=None, field="text", seq_len=512, max_tokens=None, limit=None, rounds=9,
        prompt_tokens=128, new_tokens=32, seed=0, device="cpu", dtype="float32",
    )  # fmt: skip
    environment = Environment(
        machine="x86_64", processor="a processor", cores=2, memory_bytes=16_000_000_000, accelerator=None,
        system="Linux", python="3.11", versions={"torch": "2.13.0"},
    )  # fmt: skip
    found: dict[str, Any] = {
        "date": "2026-11-22T23:30:00+02:00", "command": f"niwaki compare dense four --data '{EVIL}'", "seconds": 99.5,
        "confidence": 0.95, "settings": settings, "environment": environment,
        "dense": model("dense", 10_000_000, kind="plain", method=None, target=None, recipe=None),
        "candidates": candidates, "gate": {"confidence": 0.95, "max_perplexity_ratio": 1.1, "max_bytes": 5e6},
        "passed": all(one.passed for one in candidates),
    }  # fmt: skip
    return Comparison(**{**found, **changes})


def without_evidence() -> Comparison:
    """Return the smallest comparison: tasks only, no gates, no speed."""
    bare = candidate(
        "bare", 1.0, data=(), speed=None, generations=(), worst=(), gates=(), passed=None,
        model=model("bare", 1, memory=None, load_seconds=None, recipe=None),
    )  # fmt: skip
    return comparison(bare, gate=None, passed=None)


def records(made: list[dict[str, Any]]) -> list[MatrixRecord]:
    """Return lines of blocks.jsonl as records."""
    return [MatrixRecord.model_validate(line) for line in made]


def lines(kind: str = "codes", *, drift: bool = False) -> list[dict[str, Any]]:
    """Return lines of blocks.jsonl for three blocks with two matrices each: `codes`, `masked` or `sliced`."""
    made = []
    for block in range(3):
        for place, matrix in enumerate(("self_attn.q_proj", "mlp.down_proj")):
            about = {
                "codes": {"target": "4bit", "zeros_frac": 0.12, "bits": 4.25, "stored": {"parts": []}},
                "masked": {"target": "0.5", "zeros_frac": 0.25 + 0.25 * place, "bits": 16.0},
                "sliced": {"target": f"{4 + place} of 8 neurons", "zeros_frac": 0.0, "bits": 16.0},
            }[kind]
            made.append(
                {
                    "block": block,
                    "matrix": matrix,
                    "shape": [8, 8],
                    "kind": kind,
                    "bytes": 34,
                    "tokens": 100,
                    "error_before_update": 0.02,
                    "error": 0.01 * (block + 1) + 0.001 * place,
                    "note": EVIL,
                    "block_error": 0.1 * (block + 1),
                    "drift": 0.2 * (block + 1) if drift else None,
                    **about,
                }
            )
    return made


def layers_for(found: Comparison) -> dict[str, Layers | None]:
    """Return layers of every candidate: codes, sliced and masked in turn."""
    kinds = ("codes", "sliced", "masked")
    return {
        one.model.name: layers_of(records(lines(kinds[place % 3], drift=place == 0)))
        for place, one in enumerate(found.candidates)
    }
