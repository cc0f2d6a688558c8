"""Cost of a contextual model that stays close to the dense one: checked generation, and the gate.

    python -m benchmarks.quality.safeguards MODEL DATA --work WORK --out benchmarks/results/quality/safeguards-NAME.json

DATA holds calibration.jsonl (predictors come from it alone) and eval_reviews.jsonl. For every target a predictor is
trained as `niwaki compress --method shadow` does. Prompts of the reviews are continued greedily: dense, by the part
alone, and checked every N tokens. The exact rule accepts the choice of the full model. The other rule accepts a token
that has at least some probability in the full model (`niwaki.runtime.contextual.decoding`).

- `agreement`: share of written tokens that are the full model's own choice after the same text
- `passes`: passes of the full model per written token (one pass reads up to N at once)
- `small_steps`: tokens that the part drafts per written token
- `time_ratio`: seconds over those of dense generation, all ways in turns; Python bounds models of this size, so it is
  no measure of larger ones

Arithmetic is float32. In bfloat16 a pass over several tokens rounds differently from one token after another, and the
full model does not quite agree with itself.

The gate: `calibrate-gate` on the first half of the windows of the reviews, its effect measured on the second half.
"""

import argparse
import json
import time
from pathlib import Path

import torch

import niwaki
from benchmarks.common.provenance import provenance
from niwaki.data.documents import read_texts
from niwaki.data.texts import evaluation_windows, load_tokenizer
from niwaki.measure.prompt_gate import calibrate_gate, compare_prompt
from niwaki.runtime.contextual.decoding import generate_verified

RULES = [("exact", 4, None), ("exact", 8, None), ("p ≥ 0.3", 8, 0.3), ("p ≥ 0.1", 8, 0.1), ("p ≥ 0.03", 8, 0.03)]


def agreement(model, ids, prompt):
    """Return the share of tokens after the prompt that are the full model's own choice."""
    model.contextual.enabled = False
    with torch.no_grad():
        wanted = model(input_ids=ids, use_cache=False).logits[0, prompt - 1 : -1].argmax(-1)
    model.contextual.enabled = True
    return float((wanted == ids[0, prompt:]).float().mean())


def plain(model, ids, new, enabled):
    """Generate without checks, dense or by the part."""
    model.contextual.enabled = enabled
    mask = torch.ones_like(ids)  # or generate takes the ends of documents for padding
    found = model.generate(
        ids, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    model.contextual.enabled = True
    return found


def writing(model, windows, prompt, new):
    """Return one row per way of generation, means over prompts."""
    ways = {"dense": lambda ids: (plain(model, ids, new, False), None)}
    ways["part alone"] = lambda ids: (plain(model, ids, new, True), None)
    for rule, every, least in RULES:

        def checked(ids, every=every, least=least):
            """Generate with checks."""
            found = generate_verified(model.contextual, ids, max_new_tokens=new, every=every, min_probability=least)
            return found.ids_1T, found

        ways[f"{rule}, every {every}"] = checked
    rows = {name: {"agreement": 0.0, "passes": 0.0, "small_steps": 0.0, "kl": 0.0, "seconds": 0.0} for name in ways}
    for ids_T in windows:
        for name, way in ways.items():
            started = time.perf_counter()
            ids, found = way(ids_T[None, :prompt])
            rows[name]["seconds"] += time.perf_counter() - started
            rows[name]["agreement"] += agreement(model, ids, prompt) / len(windows)
            if found is not None:
                rows[name]["passes"] += found.passes / new / len(windows)
                rows[name]["small_steps"] += found.drafted / new / len(windows)
                rows[name]["kl"] += found.kl / len(windows)
    for row in rows.values():
        row["time_ratio"] = row["seconds"] / rows["dense"]["seconds"]
    return rows


def gates(folder, windows, prompt, args):
    """Return for every requested agreement the share of other prompts that run sparse, and the agreement of all."""
    rows = []
    data = [str(args.data / "eval_reviews.jsonl")]
    for asked in args.agreements:
        found = calibrate_gate(
            folder, data=data, agreement=asked, samples=args.samples, prompt_tokens=prompt, new_tokens=args.new,
            device="cpu",
        )  # fmt: skip
        model = niwaki.load(folder, device="cpu")
        with torch.no_grad():
            held = [compare_prompt(model.contextual, ids_T[None], prompt) for ids_T in windows]
        sparse = sum(deviation < float("inf") for deviation, *_ in held) / len(held)
        kept = sum(agreed for *_, agreed in held) / len(held)
        rows.append({"asked": asked, "calibrated": found, "held_out": {"sparse_frac": sparse, "agreement": kept}})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Measure every target, and write the result after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--targets", nargs="+", default=["0.3", "0.5"])
    parser.add_argument("--samples", type=int, default=24, help="prompts, and windows that gates are chosen on")
    parser.add_argument("--learn", type=int, default=128, help="calibration windows")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--agreements", type=float, nargs="*", default=[0.9, 0.99])
    args = parser.parse_args()
    options = {name: value for name, value in vars(args).items() if name not in ("model", "data", "work", "out")}
    result = {"model": Path(args.model).name, **provenance("cpu"), "options": options, "targets": {}}
    args.work.mkdir(parents=True, exist_ok=True)
    texts = read_texts([str(args.data / "eval_reviews.jsonl")])
    length = args.prompt + args.new
    windows = evaluation_windows(
        texts, load_tokenizer(args.model), seq_len=length, max_tokens=2 * args.samples * length
    )[args.samples :]
    for target in args.targets:
        folder = args.work / f"shadow-{target}"
        if not folder.exists():
            files = (str(args.data / "calibration.jsonl"),)
            niwaki.compress(
                args.model, folder, method="shadow", target=target, device="cpu", options={"unit": "prompt"},
                calibration={"files": files, "samples": args.learn, "seq_len": 512},
            )  # fmt: skip
        model = niwaki.load(folder, device="cpu").float()
        found = {"writing": writing(model, windows, args.prompt, args.new)}
        for name, row in found["writing"].items():
            print(target, name, {key: round(value, 4) for key, value in row.items()}, flush=True)
        found["gates"] = gates(folder, windows, args.prompt, args)
        result["targets"][target] = found
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
