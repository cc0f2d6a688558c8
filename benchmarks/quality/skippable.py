"""Curves of skipping by input: perplexity against the share of inputs that the matrices of a model do not read.

    python -m benchmarks.quality.skippable MODEL DATA --out benchmarks/results/quality/skippable-NAME.json

Windows of 512 tokens: the first 128 run dense, the others under a mask, and they are scored. `benchmarks.common.
input_masks` says when a mask is chosen and by what score. Only the labels with `oracle` read the future. In the result:

- `curves`: perplexity over that of the dense model by component, choice, score and share, on both texts. Components are
  heads (inputs of the output projection by head), the inputs of each kind of matrix, and all of them at one share. The
  neurons of a block are the inputs of `down`. `best` names the score with the lower curve.
- `blocks`: the rise of the loss when one component of one block skips half of its inputs
- `budgets`: shares of matrices by measured damage under one budget of bytes, against one share for all. Damage is the
  divergence from the dense model on calibration text: of one kind of matrix in all blocks, or of each block alone.
  `by kind and block` is the product of both. `refined` begins there, and moves bytes to where the last ones cost less
  while everything is masked, as long as the divergence falls.

DATA holds calibration.jsonl, eval_reviews.jsonl and wikitext2_test.txt. The result is written after every part.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.common.input_masks import SCORES, WHEN, InputMasks, Place, Rule, find_places, score_of, skipped_bytes
from benchmarks.common.perplexity import TEXTS
from benchmarks.common.provenance import provenance
from niwaki.data.documents import read_texts
from niwaki.data.texts import calibration_windows, evaluation_windows, load_tokenizer
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.decoder import Decoder
from niwaki.model.device import pick_device

LENGTH, PROMPT = 512, 128
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
LEVELS = (0.3, 0.5, 0.8)  # at which damage is measured for budgets
BUDGETS = (0.3, 0.5, 0.7)  # of bytes
FIRST = ("token", "prompt", "prompt, oracle", "token, threshold")  # choices measured before the others
STEP, MAX_SHARE = 0.025, 0.95  # of an allocation
PARTS, ROUNDS, NUDGE = 8, 3, 0.05  # of a refinement: parts of the depth, rounds, and the change of a share
PARTS_OF_RESULT = ("budgets", "curves", "blocks")
TINY = 1e-9  # divergence below which a difference is rounding
Rules = Mapping[Place, Rule]


class Judge:
    """Losses of the tokens after the prompt, by text; with `divergence` also that from the dense model, in nats."""

    def __init__(self, masks: InputMasks, texts: Mapping[str, Tensor], batch: int, *, divergence: bool = False) -> None:
        self.masks, self.names = masks, list(texts)
        self.counts = [len(ids_ST) for ids_ST in texts.values()]
        self.parts = torch.cat(list(texts.values())).split(batch)
        self.dense: list[tuple[Tensor, Tensor]] = []
        if divergence:
            for ids_BT in self.parts:
                log_BTV = masks.logits(ids_BT, {})[:, :-1].log_softmax(2)
                self.dense.append((log_BTV.exp(), (log_BTV.exp() * log_BTV).sum(2)))
        self.dense_losses = self.losses({})

    def losses(self, rules: Rules) -> dict[str, float]:
        """Return the mean loss of every text under the rules."""
        rows = []
        for ids_BT in self.parts:
            logits_BTV = self.masks.logits(ids_BT, rules)[:, :-1]
            wanted = logits_BTV.gather(2, ids_BT[:, PROMPT + 1 :, None])[..., 0]
            rows.append((logits_BTV.logsumexp(2) - wanted).double().mean(1))
        return dict(zip(self.names, (float(row.mean()) for row in torch.cat(rows).split(self.counts)), strict=True))

    def ratios(self, rules: Rules) -> dict[str, float]:
        """Return the perplexity over that of the dense model by text."""
        return {name: math.exp(min(loss - self.dense_losses[name], 50)) for name, loss in self.losses(rules).items()}

    def divergence(self, rules: Rules) -> float:
        """Return the mean divergence of the model under the rules from the dense one."""
        total = 0.0
        for ids_BT, (chance_BTV, negative_entropy_BT) in zip(self.parts, self.dense, strict=True):
            logits_BTV = self.masks.logits(ids_BT, rules)[:, :-1]
            cross_BT = logits_BTV.logsumexp(2) - (chance_BTV * logits_BTV).sum(2)
            total += float((negative_entropy_BT + cross_BT).double().mean(1).sum())
        return total / sum(self.counts)


def components(places: Sequence[Place], heads: int) -> dict[str, tuple[list[Place], int | None]]:
    """Return the places of every component, and the number of its units, None for single inputs."""
    kinds = list(dict.fromkeys(place.kind for place in places))
    of_kind = {kind: [place for place in places if place.kind == kind] for kind in kinds}
    single = {name: (own, None) for name, own in {**of_kind, "all": list(places)}.items()}
    return {"heads": (of_kind["o"], heads), **single}


def learn(masks: InputMasks, parts: Sequence[Tensor]) -> None:
    """Set the mean input of every place, and its thresholds at `SHARES`, by the dense model on calibration text."""
    sums: dict[Place, list[Tensor]] = {}
    masks_after = slice(PROMPT, None)

    def add(place: Place, x_BTC: Tensor) -> None:
        sums.setdefault(place, []).append(x_BTC[:, masks_after].double().mean((0, 1)))

    for ids_BT in parts:
        masks.observe(ids_BT, add)
    for place, means in sums.items():
        masks.means[place] = torch.stack(means).mean(0).float()

    def measure(place: Place, x_BTC: Tensor) -> None:
        for score in SCORES:
            found = score_of(x_BTC[:, masks_after], Rule(0, "token", score), place, masks.means[place])
            ordered = found.flatten()[:: max(1, found.numel() // 2**20)].sort().values
            for share in SHARES:
                masks.thresholds[place, share, score] = ordered[min(len(ordered) - 1, round(share * len(ordered)))]

    masks.observe(parts[0], measure)


def curves(judge: Judge, parts: Mapping, chosen: Sequence[str], late: Callable[[], bool]) -> list[dict]:
    """Return the ratio of perplexity by share for every component and score, for the choices `chosen`."""
    rows: list[dict] = []
    for when in chosen:
        for name, (own, units) in parts.items():
            if when.endswith("threshold") and units is not None:
                continue
            for score in SCORES if when.startswith("token") else SCORES[:2]:
                if late():
                    return rows
                found = [judge.ratios({p: Rule(share, when, score, units) for p in own}) for share in SHARES]
                row = {"component": name, "when": when, "score": score}
                row |= {text: [round(ratio[text], 5) for ratio in found] for text in judge.names}
                rows.append(row)
                print(f"{name}, {when}, {score}: " + "; ".join(f"{t} {row[t]}" for t in judge.names), flush=True)
    return rows


def best_of(rows: Sequence[dict], texts: Sequence[str]) -> list[dict]:
    """Return for every component and choice the row of the score with the lower mean log ratio."""
    best: dict[tuple[str, str], tuple[float, dict]] = {}
    for row in rows:
        mean = sum(math.log(ratio) for text in texts for ratio in row[text])
        key = row["component"], row["when"]
        if key not in best or mean < best[key][0]:
            best[key] = mean, row
    return [row for _, row in best.values()]


def block_damage(judge: Judge, parts: Mapping, late: Callable[[], bool]) -> list[dict]:
    """Return the rise of the loss when one component of one block skips half of its inputs."""
    rows = []
    for name, (places, units) in parts.items():
        for when in ("token", "prompt"):
            row = {"component": name, "when": when, "share": 0.5, **{text: [] for text in judge.names}}
            for block in sorted({place.block for place in places}):
                if late():
                    return rows
                own = [place for place in places if place.block == block]
                found = judge.losses({place: Rule(0.5, when, "size", units) for place in own})
                for text in judge.names:
                    row[text].append(round(found[text] - judge.dense_losses[text], 6))
            rows.append(row)
    return rows


def damage_at(levels: Sequence[float], share: float) -> float:
    """Return the damage of a share between the measured `LEVELS`, by powers; 0 for none."""
    if share <= 0:
        return 0.0
    logs = [math.log(max(max(levels[: i + 1]), TINY)) for i in range(len(levels))]
    marks = [math.log(level) for level in LEVELS]
    if share <= LEVELS[0]:
        return math.exp(logs[0] + 2 * (math.log(share) - marks[0]))
    place = next((i for i in range(1, len(LEVELS)) if share <= LEVELS[i]), len(LEVELS) - 1)
    slope = (logs[place] - logs[place - 1]) / (marks[place] - marks[place - 1])
    return math.exp(logs[place] + slope * (math.log(share) - marks[place]))


def allocate(damage: Mapping, weights: Mapping, budget: float) -> dict:
    """Return the share of every key: the next step is always taken where it costs the least damage for its bytes."""
    shares, skipped, wanted = dict.fromkeys(damage, 0.0), 0.0, budget * sum(weights.values())

    def cost(key) -> float:
        share = shares[key]
        return (damage_at(damage[key], share + STEP) - damage_at(damage[key], share)) / weights[key]

    costs = {key: cost(key) for key in damage}
    while skipped < wanted and costs:
        key = min(costs, key=costs.__getitem__)
        step = min(STEP, (wanted - skipped) / weights[key])
        shares[key] += step
        skipped += step * weights[key]
        costs[key] = cost(key)
        if shares[key] > MAX_SHARE - STEP:
            del costs[key]
    return shares


def measured_damage(judge: Judge, places: Sequence[Place], score: str) -> tuple[dict[str, list], dict[Place, list]]:
    """Return the divergence at `LEVELS` of every kind of matrix in all blocks, and of every place alone."""
    kinds = list(dict.fromkeys(place.kind for place in places))
    by_kind = {
        kind: [
            judge.divergence({place: Rule(level, "token", score) for place in places if place.kind == kind})
            for level in LEVELS
        ]
        for kind in kinds
    }
    return by_kind, {p: [judge.divergence({p: Rule(level, "token", score)}) for level in LEVELS] for p in places}


def allocations(by_kind: Mapping[str, list], alone: Mapping[Place, list], budget: float) -> dict[str, dict]:
    """Return the shares of all places by every way to allocate a budget of bytes."""
    weights = {place: place.weights for place in alone}
    sums = {kind: sum(place.weights for place in alone if place.kind == kind) for kind in by_kind}
    shares = allocate(by_kind, sums, budget)
    total = {k: [sum(alone[p][i] for p in alone if p.kind == k) for i in range(len(LEVELS))] for k in by_kind}
    both = {
        p: [own * by_kind[p.kind][i] / max(total[p.kind][i], TINY) for i, own in enumerate(alone[p])] for p in alone
    }
    return {
        "one share": dict.fromkeys(alone, budget),
        "by kind": {place: shares[place.kind] for place in alone},
        "by block": allocate(alone, weights, budget),
        "by kind and block": allocate(both, weights, budget),
    }


def refined(judge: Judge, shares: Mapping[Place, float], score: str, budget: float) -> dict[Place, float]:
    """Return shares of one budget with less divergence, found by moving bytes to where the last ones cost less.

    Costs are measured for groups of places of one kind in a part of the depth, with all other places masked.
    """
    blocks, groups = 1 + max(place.block for place in shares), {}
    for place in shares:
        groups.setdefault((place.kind, place.block * PARTS // blocks), []).append(place)

    def damage(found: Mapping[Place, float]) -> float:
        return judge.divergence({place: Rule(share, "token", score) for place, share in found.items()})

    shares, lowest, power = dict(shares), damage(shares), 0.3
    for _ in range(ROUNDS):
        costs = {}
        for key, own in groups.items():
            low, high = (shares | {p: min(max(shares[p] + by, 0), MAX_SHARE) for p in own} for by in (-NUDGE, NUDGE))
            moved = sum(p.weights * (high[p] - low[p]) for p in own)
            costs[key] = max(damage(high) - damage(low), TINY) / moved
        middle = math.exp(sum(math.log(cost) for cost in costs.values()) / len(costs))
        for _ in range(3):  # ever shorter steps, until one helps
            factors = {key: min(max((middle / cost) ** power, 0.7), 1.4) for key, cost in costs.items()}
            tried = {place: shares[place] * factors[key] for key, own in groups.items() for place in own}
            tried = of_budget(tried, budget)
            if (found := damage(tried)) < lowest:
                shares, lowest = tried, found
                break
            power /= 2
    return shares


def of_budget(shares: Mapping[Place, float], budget: float) -> dict[Place, float]:
    """Return the shares times one factor, at most MAX_SHARE each, so that they skip a budget of bytes."""
    wanted, low, high = budget * sum(place.weights for place in shares), 0.0, 8.0
    for _ in range(40):
        factor = (low + high) / 2
        above = sum(p.weights * min(factor * share, MAX_SHARE) for p, share in shares.items()) > wanted
        low, high = (low, factor) if above else (factor, high)
    return {place: min(low * share, MAX_SHARE) for place, share in shares.items()}


def budgets(calibration: Judge, texts: Judge, places: Sequence[Place]) -> dict:
    """Measure damage on calibration text, allocate every budget, and return the ratios of both texts."""
    half = {score: calibration.divergence({p: Rule(0.5, "token", score) for p in places}) for score in SCORES}
    score = min(half, key=half.__getitem__)
    print(f"divergence at half of all inputs: {half}", flush=True)
    by_kind, alone = measured_damage(calibration, places, score)
    rows = []
    for budget in BUDGETS:
        ways = allocations(by_kind, alone, budget)
        ways["refined"] = refined(calibration, ways["by kind and block"], score, budget)
        for label, shares in ways.items():
            rules = {place: Rule(share, "token", score) for place, share in shares.items()}
            row = {"budget": budget, "shares": label, "bytes": round(skipped_bytes(rules, places), 4)}
            row |= {"calibration divergence": calibration.divergence(rules), **texts.ratios(rules)}
            row["share"] = {kind: [round(s, 3) for p, s in shares.items() if p.kind == kind] for kind in by_kind}
            rows.append(row)
            print({name: value for name, value in row.items() if name != "share"}, flush=True)
    damage = {kind: [[round(d, 7) for d in alone[p]] for p in places if p.kind == kind] for kind in by_kind}
    measured = {"levels": LEVELS, "by kind": by_kind, "by block": damage}
    return {"score": score, "divergence at 0.5": half, "damage": measured, "rows": rows}


def main() -> None:
    """Measure budgets, curves and blocks, and write the result after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tokens", type=int, default=50_000, help="of each text, for the budgets")
    parser.add_argument("--curve-tokens", type=int, default=8192, help="of each text, for curves and blocks")
    parser.add_argument("--samples", type=int, default=16, help="calibration windows")
    parser.add_argument("--memory", type=int, default=64, help="tokens that renewed masks look back at")
    parser.add_argument("--batch", type=int, default=48, help="windows of a forward")
    parser.add_argument("--seconds", type=float, default=230.0, help="after which no further measurement begins")
    parser.add_argument("--parts", nargs="+", choices=PARTS_OF_RESULT, default=PARTS_OF_RESULT)
    args = parser.parse_args()
    started, device = time.time(), pick_device(args.device)
    torch.set_float32_matmul_precision("highest")
    decoder = Decoder(Checkpoint.open(args.model), device, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device).eval()
    places = find_places(decoder, model.requires_grad_(False))
    heads = decoder.checkpoint.config.get_text_config().num_attention_heads
    masks = InputMasks(model, places, PROMPT, args.memory)
    tokenizer = load_tokenizer(args.model)

    def windows(tokens: int) -> dict[str, Tensor]:
        """Return the first windows of both texts."""
        read = {name: read_texts([str(args.data / file)]) for name, file in TEXTS.items()}
        cut = {"seq_len": LENGTH, "max_tokens": tokens}
        return {name: evaluation_windows(text, tokenizer, **cut).to(device) for name, text in read.items()}

    documents = read_texts([str(args.data / "calibration.jsonl")])
    ids_ST = calibration_windows(documents, tokenizer, samples=args.samples, seq_len=LENGTH, seed=0).to(device)
    result = {"model": Path(args.model).name, **provenance(args.device), "prompt": PROMPT, "window": LENGTH}
    result |= {name: getattr(args, name) for name in ("tokens", "curve_tokens", "samples", "memory")}
    result |= {"weights": {kind: sum(p.weights for p in places if p.kind == kind) for kind in {p.kind for p in places}}}

    def save(**found) -> None:
        """Write the result with further parts."""
        result.update(found, seconds=round(time.time() - started, 1))
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{', '.join(found)}: {result['seconds']} s", flush=True)

    def late() -> bool:
        """Return True when the time is over."""
        return time.time() - started > args.seconds

    learn(masks, ids_ST.split(args.batch))
    whole = Judge(masks, windows(args.tokens), args.batch)
    dense = {name: math.exp(loss) for name, loss in whole.dense_losses.items()}
    scored = {name: count * (LENGTH - PROMPT - 1) for name, count in zip(whole.names, whole.counts, strict=True)}
    save(dense=dense, tokens_scored=scored)
    if "budgets" in args.parts:
        calibration = Judge(masks, {"calibration": ids_ST}, args.batch, divergence=True)
        save(budgets=budgets(calibration, whole, places))
    parts, few = components(places, heads), Judge(masks, windows(args.curve_tokens), args.batch)
    rows: list[dict] = []
    if "curves" in args.parts:
        rows += curves(few, parts, FIRST, late)
        save(shares=SHARES, best=best_of(rows, few.names), curves=rows)
    if "blocks" in args.parts:
        save(blocks=block_damage(Judge(masks, windows(args.curve_tokens // 2), args.batch), parts, late))
    if "curves" in args.parts:
        rows += curves(few, parts, [when for when in WHEN if when not in FIRST], late)
        save(best=best_of(rows, few.names), curves=rows)


if __name__ == "__main__":
    main()
