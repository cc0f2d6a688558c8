"""What the page says of a comparison."""

import pytest

from niwaki.measure.report import passages, views
from niwaki.measure.report.strings import strings
from niwaki.measure.schema import Verdict
from support.reports import DATA, candidate, comparison, estimate, generation, pace, quality, verdict, without_evidence

EN, JA = strings("en"), strings("ja")


def test_the_headline_counts_those_that_pass() -> None:
    good, bad = candidate("good", 1.05), candidate("bad", 1.4)
    assert views.headline(EN, comparison(good, bad)) == "1 of 2 candidates pass all gates: good."
    assert views.headline(EN, comparison(good)) == "Every candidate passes all gates (1 of 1)."
    assert views.headline(EN, comparison(bad)) == "No candidate passes all gates (0 of 1)."
    assert "nothing was judged" in views.headline(EN, without_evidence())


def test_a_card_leads_with_bytes_speed_and_quality() -> None:
    (card,) = views.cards(EN, comparison(candidate("four", 1.05)))
    size, speed, perplexity, accuracy = card["metrics"]
    assert (size["big"], size["lines"]) == ("−60.0%", ["4.00 MB instead of 10.0 MB"])
    assert (speed["big"], speed["unclear"]) == ("×1.25", True)
    assert speed["lines"] == ["125 instead of 100 tokens/s", "95% interval: ×0.91 to ×1.43"]
    assert (perplexity["label"], perplexity["big"]) == ("Perplexity on mine.jsonl", "+5.0%")
    assert perplexity["unclear"] is False and "95% interval: +4.0% to +6.0%" in perplexity["lines"]
    assert (accuracy["big"], accuracy["unclear"]) == ("−2.0 points", True)
    assert card["failures"] == []


def test_a_card_shows_the_worst_file_and_says_so() -> None:
    first = candidate("four", 1.05)
    other = first.data[0].model_copy(update={"data": "b/other.jsonl", "whole": quality(1.3)})
    both = first.model_copy(update={"data": (first.data[0], other)})
    found = comparison(both)
    found = found.model_copy(update={"settings": found.settings.model_copy(update={"data": (DATA, "b/other.jsonl")})})
    label = views.cards(EN, found)[0]["metrics"][2]
    assert (label["label"], label["big"]) == ("Perplexity on other.jsonl, worst of 2", "+30.0%")


def test_speed_without_an_interval_is_no_difference_that_is_told_apart() -> None:
    first = candidate("four", 1.05)
    alone = first.speed.model_copy(update={"decode": pace(estimate(0.5, None, None, 3))})
    speed = views.cards(EN, comparison(first.model_copy(update={"speed": alone})))[0]["metrics"][1]
    assert speed["lines"][1] == "no interval: only 3 independent units" and not speed["unclear"]


def test_failed_gates_are_on_the_card_the_first_three_of_them() -> None:
    gates = tuple(verdict("max_kl", 0.1, 0.2, 0.3, False, str(n)) for n in range(5))
    (card,) = views.cards(EN, comparison(candidate("four", 1.05, gates=gates, passed=False)))
    assert len(card["failures"]) == 3 and card["more"] == "2 more"


REASONS = [
    (verdict("max_kl", 0.1, 0.05, 0.08, True), "at 95% confidence no worse than 0.08, limit 0.1"),
    (verdict("max_kl", 0.1, 0.2, 0.3, False), "measured 0.2, limit 0.1"),
    (verdict("max_kl", 0.1, 0.05, 0.3, False), "measured 0.05, but at 95% confidence it may be 0.3; limit 0.1"),
    (
        verdict("min_top1_agreement", 0.8, 0.85, 0.79, False),
        "measured 85%, but at 95% confidence it may be 79%; limit 80%",
    ),
    (verdict("min_top1_agreement", 0.8, 0.75, 0.7, False), "measured 75%, limit 80%"),
    (verdict("max_kl", 0.1, 0.05, None, False), "too few data for 95% confidence"),
    (verdict("max_kl", 0.1, None, None, False), "not measured"),
    (verdict("max_bytes", 5e6, 4e6, 4e6, True), "4.00 MB keeps the limit 5.00 MB"),
    (verdict("max_bytes", 5e6, 6e6, 6e6, False), "6.00 MB exceeds the limit 5.00 MB"),
]


@pytest.mark.parametrize(("one", "told"), REASONS)
def test_reasons_come_from_the_numbers(one: Verdict, told: str) -> None:
    assert views.reason(EN, one) == told
    assert views.reason(JA, one) != told


def test_a_gate_without_evidence_also_says_what_the_gate_said() -> None:
    gates = (verdict("max_kl", 0.1, None, None, False), verdict("max_bytes", 5e6, 4e6, 4e6, True))
    first, second = views.gates(JA, comparison(candidate("four", 1.05, gates=gates)))[0]["gates"]
    assert first["original"] == "told in English" and second["original"] == ""
    assert (first["measured"], first["limit"]) == ("なし", "≤ 0.1")


def test_measured_values_of_the_dense_model_are_those_of_all_turns() -> None:
    slow = candidate("slow", 1.1)
    other = slow.speed.decode.model_copy(update={"dense_median": 80.0})
    slow = slow.model_copy(update={"speed": slow.speed.model_copy(update={"decode": other})})
    grid = views.measured(EN, comparison(candidate("four", 1.05), slow))
    assert grid.rows[0][-1] == "80.0–100 tokens/s" and grid.rows[1][-1] == "125 tokens/s"
    assert grid.rows[1][-1].sub == "×1.25, ×0.91 to ×1.43"
    assert "Peak GPU memory" not in grid.columns
    assert views.measured(EN, without_evidence()).columns == ("Model", "File size")


def test_texts_are_split_where_they_differ() -> None:
    groups = passages.generations(EN, comparison(candidate("four", 1.05), candidate("two", 1.4)))
    assert [text["name"] for text in groups[0]["texts"]] == ["dense model", "four", "two"]
    own = groups[0]["texts"][1]
    assert (own["same"], [piece["text"] for piece in own["rest"]]) == (" a", [" new", " text"])
    assert [piece["kind"] for piece in own["rest"]] == ["first", "later"]
    assert own["note"] == "Differs from token 2 of 3 on."
    assert groups[1]["texts"][1]["rest"] == () and "all 3 tokens" in groups[1]["texts"][1]["note"]


def test_tokens_that_are_parts_of_characters_are_split_by_characters() -> None:
    parts = generation(True).model_copy(
        update={"dense": ("�", "�"), "candidate": ("�", "�"), "dense_text": "日本", "candidate_text": "日光"}
    )
    own = passages.generations(EN, comparison(candidate("four", 1.05, generations=(parts,))))[0]["texts"][1]
    assert (own["same"], own["rest"][0]["text"]) == ("日", "光")


def test_tokens_of_examples_have_a_level_and_what_was_expected() -> None:
    (found,) = passages.worst(EN, comparison(candidate("four", 1.05)))
    first = found["examples"][0]
    assert [token["level"] for token in first["tokens"]] == [0, 2, 4]
    assert [token["differs"] for token in first["tokens"]] == [False, True, True]
    assert [token["shown"] for token in first["details"]][:2] == ["↵", "␣b"]
    assert first["details"][0]["probability"] == "90.5% → 5.0%"
    assert len(passages.legend()) == 5


def test_flips_are_told_with_their_direction() -> None:
    grid = passages.tasks(EN, comparison(candidate("four", 1.05)))
    (group,) = grid.more["flips"]
    assert [flip["kind"] for flip in group["flips"]] == ["right → wrong", "wrong → right"]
    assert group["more"] == "2 of 3 shown; all are in compare.json."
    assert len(grid.rows) == 2 and grid.rows[0][6] == "−2.0" and grid.rows[0][6].sub == "−7.0 to +3.0"
