"""Class of every causal model type of transformers, against the committed table."""

import json
from pathlib import Path

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.quality.model_types import REFUSED, classify

ROOT = Path(__file__).parents[2]
TABLE = json.loads((ROOT / "benchmarks/results/quality/model-types.json").read_text(encoding="utf-8"))
PINNED = f"transformers=={transformers.__version__}\n" in (ROOT / "constraints.txt").read_text(encoding="utf-8")


def test_every_type_has_its_class() -> None:
    """With another transformers, every type still ends as one that works or as an error of niwaki, not as a crash."""
    if PINNED:
        assert set(TABLE["rows"]) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        found = classify(model_type)
        if PINNED:
            row = TABLE["rows"][model_type]
            assert (found.status, dict(found.kept_dense)) == (row["found"], row["kept_dense"]), model_type
            assert row["status"] == found.status or row["status"] == REFUSED


def test_no_type_is_refused_for_a_crash() -> None:
    for model_type, row in TABLE["rows"].items():
        assert bool(row["reason"]) == (row["status"] != "works"), model_type
        assert "CRASH" not in row["reason"], (model_type, row["reason"])
