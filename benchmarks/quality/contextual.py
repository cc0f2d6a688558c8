"""Contextual sparsity under a causal protocol: the mask comes from the first P tokens, the following ones are scored.

    python -m benchmarks.quality.contextual MODEL DATA --out benchmarks/results/quality/contextual-NAME.json

DATA holds calibration.jsonl (predictors and static masks come from it alone), eval_reviews.jsonl, wikitext2_test.txt.
Windows have P + `--continuation` tokens. The prompt runs dense. From P on, skipped units put out zero, or their mean in
the prompt if the label says so. Every method skips the same number of head groups and neurons in every block. `shadow`
is `niwaki compress --method shadow --set unit=prompt`, with its choice of criteria per target. With `batch of 8 shares
neurons` every sequence runs the same neurons and its own heads (`selection.for_batch`, whole batches only). `unions` is
the share of the neurons that batches run when no sequence loses any of its own.

Rivals:

- `static X`: mean criterion X over the calibration text (`static plainact heads, fisher neurons`: each its own)
- `griffin`: activations in the prompt, normalised by token; heads by the norm of their output
- `dejavu`: a predictor of ‖h‖ for every block, from the output of its own heads at the last prompt token
- `random`
- `oracle`: reads the continuation itself; a ceiling, no method
"""

import argparse
import json
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy, kl_div

from benchmarks.common.provenance import provenance
from benchmarks.common.units import Watch, dejavu_scores, fit_dejavu
from niwaki.compression.contextual import evaluate_candidates
from niwaki.compression.traces import trace
from niwaki.data.documents import read_texts
from niwaki.data.stream import Stream
from niwaki.data.texts import calibration_windows, evaluation_windows, load_tokenizer
from niwaki.methods import shadow
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.decoder import Decoder
from niwaki.model.device import pick_device
from niwaki.runtime.contextual.criteria import CRITERIA
from niwaki.runtime.contextual.selection import Rule, for_batch
from niwaki.runtime.contextual.traces import Traces, prompt_lengths
from niwaki.runtime.contextual.units import KINDS, find_layout

TEXTS = {"reviews": "eval_reviews.jsonl", "wikitext2": "wikitext2_test.txt"}
# Label → options of the method. Criteria are those that the evaluation of candidates chose, unless given here.
SHADOWS = {
    "shadow": {},
    "shadow without stand-in": {"mean_fill": 0.0},
    "shadow with whole stand-in": {"mean_fill": 1.0},
    "shadow without trust": {"shrinkage": False},
    "shadow, no learned part": {"features": "none"},
    "shadow, all features": {"features": "last+mean+prompt"},
    "shadow, last token only": {"features": "last", "shrinkage": False, "mean_fill": 0.0},
    "shadow, plainact and fisher": {"head_criterion": "plainact", "criterion": "fisher"},
    "shadow, energy": {"criterion": "energy", "head_criterion": "energy", "mean_fill": 0.0},
    "shadow, fisher": {"head_criterion": "fisher", "criterion": "fisher"},
    "shadow, plainact, last token only": {
        "head_criterion": "plainact", "criterion": "plainact", "features": "last", "shrinkage": False, "mean_fill": 0.0,
    },
}  # fmt: skip
MEAN_FILL = shadow.Config(unit="prompt").mean_fill  # for rivals that get one too
BATCH = 8  # sequences of a forward, and those that share neurons
UNIONS = (4, 8, 16)


def spearman(found_NU, true_NU, layout):
    """Return the mean rank correlation over samples, of all heads and of all neurons (ties by place)."""
    result = {}
    pairs = zip(KINDS, layout.split(found_NU), layout.split(true_NU), strict=True)
    for kind, left, right in pairs:
        ranks = [part.flatten(1).argsort(1).argsort(1).float() for part in (left, right)]
        ranks = [part - part.mean(1, keepdim=True) for part in ranks]
        product = (ranks[0] * ranks[1]).sum(1) / (ranks[0].norm(dim=1) * ranks[1].norm(dim=1))
        result[kind] = round(float(product.mean()), 4)
    return result


def traces_of(decoder, ids_ST, layout, args):
    """Return the traces of all criteria, from the file `--traces` if it is there."""
    if args.traces and args.traces.is_file():
        return {name: Traces(**parts) for name, parts in torch.load(args.traces, weights_only=True).items()}
    traces = trace(
        decoder, ids_ST, layout, CRITERIA, cuts=2, gradient_windows=len(ids_ST),
        make_stream=lambda ids, name: Stream(decoder, ids),
    )  # fmt: skip
    if args.traces:
        torch.save({name: vars(found) for name, found in traces.items()}, args.traces)
    return traces


def learn(decoder, ids_ST, layout, args, watch_time):
    """Return the traces of all criteria on the device, and by target the predictors of SHADOWS."""
    traces = {name: found.to(decoder.device) for name, found in traces_of(decoder, ids_ST, layout, args).items()}
    watch_time("traces")
    weights = decoder.anatomy.weights
    fitted, learned, about = {}, {}, {}
    for target in args.targets:
        chosen, tried = evaluate_candidates(
            shadow,
            shadow.Config(unit="prompt"),
            traces,
            layout,
            target,
            decoder,
            ids_ST,
            lambda ids, name: Stream(decoder, ids),
        )
        criteria = {name: getattr(chosen, name) for name in shadow.CANDIDATES}
        about[f"trial at {target}"] = criteria | {"tried": tried}
        print(f"trial at {target}: {about[f'trial at {target}']}", flush=True)
        for label, options in SHADOWS.items():
            config = replace(chosen, **options)
            key = config.head_criterion, config.criterion, config.features, config.shrinkage
            if key not in fitted:  # the fill changes nothing that is learned
                fitted[key], found = shadow.learn(shadow.samples(traces, layout, config), layout, config, weights)
                about[", ".join(map(str, key))] = found | {"parameters": fitted[key].parameters}
            learned.setdefault(target, {})[label] = fitted[key], config
        watch_time(f"trial and predictors at {target}")
    return traces, learned, about


def correlate(traces, layout, weights):
    """Return the rank correlations of predictions on a quarter of the samples, which the fit here does not use."""
    correlations = {}
    for name in CRITERIA:
        cut = len(traces[name]) * 3 // 4
        config = shadow.Config(unit="prompt", criterion=name, head_criterion=name, features="last", shrinkage=False)
        samples = shadow.samples(traces, layout, config)
        train, test = samples.take(slice(0, cut)), samples.take(slice(cut, None))
        predictor, _ = shadow.learn(train, layout, config, weights)
        static = predictor.prior_U.expand(len(test), -1)
        scores = predictor.scores(test.last_ND, test.mean_ND, test.prompt_NU)
        found = {"predictor": scores, "static": static}
        correlations[name] = {label: spearman(row, test.score_NU.float(), layout) for label, row in found.items()}
        print(name, correlations[name], flush=True)
    return correlations


def shared(rule, scores_BU, layout):
    """Return the mask of every sequence [B, U] when the batch shares one choice of neurons."""
    heads_BLG, neurons_LG = for_batch(rule, scores_BU, layout, "shared")
    return layout.join(heads_BLG, neurons_LG.expand(len(scores_BU), -1, -1))


def unions(rule, scores_NU, layout):
    """Return the share of all neurons that the union of the sequences of a batch runs, by size of the batch."""
    return {
        size: sum(float(for_batch(rule, part, layout)[1].float().mean()) for part in parts) / len(parts)
        for size in UNIONS
        if (parts := [part for part in scores_NU.split(size) if len(part) == size])
    }


def measure(watch, windows, prompt, targets, rivals, learned, dejavu, sensitivity_U, seed):
    """Return sums over all scored tokens by label and target."""
    sums = defaultdict(lambda: [0.0, 0.0, 0.0, 0])
    generator = torch.Generator().manual_seed(seed)
    layout = watch.layout
    found_BU = defaultdict(list)
    for ids_BT in windows.split(BATCH):
        ids_BT = ids_BT.to(sensitivity_U.device)
        dense, seen = watch.observe(ids_BT, prompt)
        add(sums["dense", 0.0], dense, dense, ids_BT, prompt)
        scores = {label: (row.expand(len(ids_BT), -1), 0.0) for label, row in rivals.items()}
        scores["random"] = torch.rand(len(ids_BT), layout.size, generator=generator).to(ids_BT.device), 0.0
        scores["griffin"] = seen["griffin"], 0.0
        scores["griffin with stand-in"] = seen["griffin"], MEAN_FILL
        scores["dejavu"] = dejavu_scores(dejavu, seen, layout), 0.0
        scores["oracle"] = seen["continuation"] * sensitivity_U, 0.0
        for label in rivals:
            scores[f"{label} with stand-in"] = scores[label][0], MEAN_FILL
        for target in targets:
            for label, (predictor, config) in learned[target].items():
                found = predictor.scores(seen["last"][:, 0], seen["mean"], seen["prompt"])
                scores[label] = found, config.mean_fill
            rule, (own_BU, mean_fill) = Rule(target), scores["shadow"]
            masks = {label: (rule.select(row_BU, layout), share) for label, (row_BU, share) in scores.items()}
            if len(ids_BT) == BATCH:
                masks[f"shadow, batch of {BATCH} shares neurons"] = shared(rule, own_BU, layout), mean_fill
            for label, (kept_BU, share) in masks.items():
                add(sums[label, target], watch.masked(ids_BT, prompt, kept_BU, share), dense, ids_BT, prompt)
            found_BU[target].append(own_BU)
    return sums, {target: unions(Rule(target), torch.cat(parts), layout) for target, parts in found_BU.items()}


def add(total, logits, dense, ids_BT, prompt):
    """Add loss, agreement, divergence and number of tokens of a batch to a total."""
    found, wanted = logits[:, prompt:-1].flatten(0, 1), dense[:, prompt:-1].flatten(0, 1)
    total[0] += float(cross_entropy(found, ids_BT[:, prompt + 1 :].flatten(), reduction="sum"))
    total[1] += float((found.argmax(1) == wanted.argmax(1)).sum())
    total[2] += float(kl_div(found.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="sum"))
    total[3] += len(found)


def main() -> None:
    """Measure every prompt length and text, and write the result after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=512, help="calibration windows")
    parser.add_argument("--traces", type=Path, help="file that keeps the traces from one run to the next")
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--continuation", type=int, default=256)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.3, 0.5, 0.7])
    parser.add_argument("--max-tokens", type=int, default=50_000)
    args = parser.parse_args()
    started, device = time.time(), pick_device(args.device)
    torch.set_float32_matmul_precision("highest")
    decoder = Decoder(Checkpoint.open(args.model), device, torch.float32)
    layout, tokenizer = find_layout(decoder.anatomy, decoder.model, 1), load_tokenizer(args.model)
    calibration = read_texts([str(args.data / "calibration.jsonl")])
    ids_ST = calibration_windows(calibration, tokenizer, samples=args.samples, seq_len=512, seed=args.seed)
    stage = [started]

    def watch_time(name):
        """Print the seconds since the last stage."""
        now = time.time()
        print(f"{name}: {now - stage[0]:.1f} s", flush=True)
        stage[0] = now

    traces, learned, about = learn(decoder, ids_ST, layout, args, watch_time)
    correlations = correlate(traces, layout, decoder.anatomy.weights)
    watch_time("rank correlations")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device).eval()
    watch = Watch(model.requires_grad_(False), layout)
    dejavu = fit_dejavu(watch, ids_ST, prompt_lengths(512, 2), traces["l2"], device)
    watch_time("per-block predictors")
    static = {f"static {name}": traces[name].score_NU.float().mean(0) for name in ("fisher", "plainact")}
    parts = [layout.split(static[f"static {name}"][None])[place] for place, name in enumerate(("plainact", "fisher"))]
    static["static plainact heads, fisher neurons"] = layout.join(*parts)[0]
    sensitivity_U = traces["energy"].sensitivity_U
    static["static energy"] = traces["energy"].score_NU.float().mean(0) * sensitivity_U
    options = {name: value for name, value in vars(args).items() if name not in ("model", "data", "out", "traces")}
    result = {"model": Path(args.model).name, **provenance(args.device), "options": options}
    result |= {"spearman": correlations, "predictors": about, "rows": [], "unions": []}
    for prompt in args.prompts:
        for text, file in TEXTS.items():
            windows = evaluation_windows(
                read_texts([str(args.data / file)]), tokenizer,
                seq_len=prompt + args.continuation, max_tokens=args.max_tokens,
            )  # fmt: skip
            sums, together = measure(
                watch, windows, prompt, args.targets, static, learned, dejavu, sensitivity_U, args.seed
            )
            for (label, target), (loss, agreed, kl, count) in sums.items():
                row = {"prompt": prompt, "text": text, "target": target, "label": label, "tokens": count}
                row |= {
                    "perplexity": float(torch.tensor(loss / count).double().exp()),
                    "top1_agreement": agreed / count,
                    "kl": kl / count,
                }
                result["rows"].append(row)
                numbers = f"ppl {row['perplexity']:.2f} top-1 {row['top1_agreement']:.3f} kl {row['kl']:.4f}"
                print(f"P={prompt} {text} {target} {label}: {numbers}", flush=True)
            result["unions"] += [{"prompt": prompt, "text": text, "target": t, "kept": k} for t, k in together.items()]
            print(f"P={prompt} {text} kept by unions: {together}", flush=True)
            watch_time(f"P={prompt} {text}")
            result["seconds"] = round(time.time() - started, 1)
            args.out.write_text(json.dumps(result, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
