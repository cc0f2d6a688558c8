"""Texts of targets, of bytes and of kept blocks, and the words of each kind."""

from typing import get_args

import pytest

from niwaki.config.recipe import (
    Recipe,
    explanations,
    make_recipe,
)
from niwaki.config.targets import (
    NM,
    WRITTEN_TARGETS,
    Bits,
    KeepUnits,
    PrunedBits,
    Sparsity,
    Target,
    parse_bytes,
    parse_target,
)
from niwaki.errors import TargetError


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("0.5", Sparsity(0.5)),
        ("50%", Sparsity(0.5)),
        (" 2:4 ", NM(2, 4)),
        ("4:8", NM(4, 8)),
        ("2:4@0.45", NM(2, 4, 0.45)),
        ("2:4@45%", NM(2, 4, 0.45)),
        ("2:4@0.45+4bit", PrunedBits(NM(2, 4, 0.45), Bits(4))),
        ("4bit", Bits(4)),
        ("1.75 bits", Bits(1.75)),
        ("2:4+4bit", PrunedBits(NM(2, 4), Bits(4))),
        (" 50% + 8 bits ", PrunedBits(Sparsity(0.5), Bits(8))),
    ],
)
def test_targets(text: str, target: object) -> None:
    assert parse_target(text) == target


@pytest.mark.parametrize(
    "text", ["0", "1", "1.5", "-0.2", "nan", "4:4", "0:4", "5:4", "half", "", "0.5bit", "9bit", "2:4:8"]
)
def test_impossible_targets(text: str) -> None:
    with pytest.raises(TargetError, match="target"):
        parse_target(text)


@pytest.mark.parametrize("text", ["2:4@0.5", "2:4@0", "2:4@", "2:4@nan", "2:4@-0.1", "1:4@80%"])
def test_a_part_has_fewer_zeros_than_the_whole(text: str) -> None:
    with pytest.raises(TargetError, match=r"after @ comes the share of zeros .*, between 0 and 0\.(5|75), such as"):
        parse_target(text)


@pytest.mark.parametrize("text", ["4bit+2:4", "2:4+0.5", "4bit+4bit", "2:4+", "+4bit", "2:4+4bit+8bit", "+"])
def test_zeros_come_before_bits(text: str) -> None:
    with pytest.raises(TargetError, match=r"zeros first, then the bits of the kept weights, such as 2:4\+4bit"):
        parse_target(text)


@pytest.mark.parametrize("text", ["5:4+4bit", "2:4+9bit", "half+4bit"])
def test_both_parts_of_a_target_are_checked(text: str) -> None:
    with pytest.raises(TargetError):
        parse_target(text)


@pytest.mark.parametrize(
    ("text", "hint"), [("50", "write 50% or 0.5"), ("2.5", "write 2.5% or 0.025"), ("150%", "50%")]
)
def test_a_percentage_without_its_sign_is_suggested(text: str, hint: str) -> None:
    with pytest.raises(TargetError, match=hint):
        parse_target(text)


@pytest.mark.parametrize(
    ("text", "count"),
    [("1700000000", 1_700_000_000), ("1.7GB", 1_700_000_000), ("800 MiB", 800 * 2**20), ("3kb", 3000), ("12b", 12)],
)
def test_bytes(text: str, count: int) -> None:
    assert parse_bytes(text) == count
    assert make_recipe({"method": "squeeze10", "target_bytes": text}).target_bytes == count


@pytest.mark.parametrize("text", ["", "0", "-1", "1.7XB", "GB", "1e9", "0.0GB"])
def test_what_are_no_bytes(text: str) -> None:
    with pytest.raises(TargetError, match="expected a number of bytes"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("given", "kept"),
    [("auto", "auto"), ("none", ()), ([], ()), ("7, 0,7", (0, 7)), ([3, 1], (1, 3)), (5, (5,)), ("0", (0,))],
)
def test_kept_blocks(given: object, kept: object) -> None:
    assert make_recipe({"method": "squeeze10", "target": "2bit", "keep_blocks": given}).keep_blocks == kept


@pytest.mark.parametrize("given", ["automatic", "1,", "-1", [-1], 1.5, {"a": 1}, True])
def test_what_are_no_blocks(given: object) -> None:
    with pytest.raises(TargetError, match="expected auto, none or numbers of blocks"):
        make_recipe({"method": "squeeze10", "target": "2bit", "keep_blocks": given})


def test_target_prints_as_it_is_written() -> None:
    assert [str(parse_target(text)) for text in ("0.5", "2:4", "2:4+4bit")] == ["0.5", "2:4", "2:4+4bit"]


def test_every_kind_of_target_describes_itself() -> None:
    assert {*WRITTEN_TARGETS, KeepUnits} == set(get_args(Target))
    explained = explanations(Recipe)["target"]
    for kind in WRITTEN_TARGETS:
        target = parse_target(kind.example)
        assert type(target) is kind and kind.words in explained and kind.example in explained
        multiple = target.columns_multiple
        assert target.zeros_in(3, 5 * multiple) >= 0, "columns in multiples of it always fit"
    with pytest.raises(TargetError) as raised:
        parse_target("half")
    assert all(kind.example in str(raised.value) for kind in WRITTEN_TARGETS)
