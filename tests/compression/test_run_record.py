"""Records of a result: sums over matrices, one reader and one writer."""

from niwaki.compression.run_record import MatrixRecord
from niwaki.compression.totals import method_bits

LINE = {
    "block": 0, "matrix": "mlp.down_proj", "shape": [2, 8], "target": "4bit", "kind": "codes", "zeros_frac": 0.0,
    "bytes": 8, "bits": 4.0, "error_before_update": None, "error": None,
}  # fmt: skip


def test_bits_counted_by_methods_are_a_mean_over_weights() -> None:
    lines = [
        MatrixRecord.model_validate({**LINE, "shape": shape, **size})
        for shape, size in (([2, 8], {"method_bytes": 4}), ([4, 8], {"method_bytes": 12}), ([9, 9], {}))
    ]
    assert method_bits(lines) == {"method_bits": round(8 * 16 / 48, 4)}
    assert method_bits(lines[2:]) == {}
