"""Records of a result: sums over matrices, one reader and one writer."""

from niwaki.compression.run_record import method_bits


def test_bits_counted_by_methods_are_a_mean_over_weights() -> None:
    lines = [{"shape": [2, 8], "method_bytes": 4}, {"shape": [4, 8], "method_bytes": 12}, {"shape": [9, 9]}]
    assert method_bits(lines) == {"method_bits": round(8 * 16 / 48, 4)}
    assert method_bits(lines[2:]) == {}
