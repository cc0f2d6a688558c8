"""Error of single matrices at equal true bits: the trellis beside grids of one width and columns of two widths.

    python -m benchmarks.quality.layer_errors MODEL DATA --out benchmarks/results/quality/layer-errors-NAME.json

The Gram matrices are those of the inputs of one block in the dense model: 32 windows of 512 tokens of
calibration.jsonl, and 8 windows each of eval_reviews.jsonl and wikitext2_test.txt to judge by. Nothing is learned. The
error is tr(ΔHΔᵀ) / tr(WHWᵀ) on the second text; bits count everything that is stored.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common.provenance import provenance
from niwaki.config.targets import Bits
from niwaki.data.statistics import Needs, Statistics
from niwaki.methods import gptq, squeeze10, trellis
from niwaki.methods.shared.rounding import groups_of

WINDOW, LEARNED_WINDOWS, JUDGED_WINDOWS = 512, 32, 8
KINDS = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")
CASES: list[tuple[str, float, dict[str, Any]]] = [
    ("gptq", 2, {"group": 64}),
    ("gptq", 3, {"group": 64}),
    *[(method, bits, {}) for bits in (1.5, 1.75, 2.0, 2.28, 2.75, 3.25, 4.0) for method in ("squeeze10", "trellis")],
]


def windows(path: Path, tokenizer: Any, count: int) -> Tensor:
    """Return the first windows of a text [count, WINDOW]; a token has two characters at least."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        text = "\n".join(json.loads(line)["text"] for line in text.split("\n")[:2000] if line)
    ids = tokenizer(text[: 16 * count * WINDOW], add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: count * WINDOW]).view(count, WINDOW)


@torch.no_grad()
def grams(model: Any, block: nn.Module, ids: Tensor) -> dict[str, Statistics]:
    """Return XᵀX of the inputs of the matrices in a block."""
    found: dict[str, Statistics] = {}
    hooks = []
    for name, module in block.named_modules():
        if name.endswith(KINDS):
            own = found[name] = Statistics(Needs(gram=True))
            hooks.append(module.register_forward_hook(lambda _, inputs, _out, own=own: own.add(inputs[0])))
    for row in ids:
        model.model(row[None])
    for hook in hooks:
        hook.remove()
    return found


def rounded(
    method: str, bits: float, options: dict[str, Any], weight_OI: Tensor, statistics: Statistics
) -> tuple[Tensor, float]:
    """Return the rounded matrix and its bits."""
    rows, columns = weight_OI.shape
    if method == "gptq":
        config = gptq.Config(**options)
        problem = gptq._Problem.of_gram(statistics.gram_II, config, config.damping_frac)
        groups = groups_of(0, columns, int(bits), "affine", config.group)
        stored = gptq.stored_bytes("m", rows, columns, Bits(bits), config)
        return problem.round(weight_OI, groups, config, None).values_OI, 8 * stored / weight_OI.numel()
    if method == "squeeze10":
        own = squeeze10.Config(learn_rounds=0, **options)
        split = squeeze10.split_columns(rows, columns, Bits(bits), own)
        latent = squeeze10._squeeze(
            weight_OI, squeeze10.RoundingProblem.of(statistics, own), split, own, torch.Generator()
        )
        values_OI = torch.empty_like(weight_OI)
        values_OI[:, latent.groups.order_I] = latent.rounded.values_OI
        return values_OI, 8 * split.nbytes(rows, columns, own) / weight_OI.numel()
    config_t = trellis.Config(learn_rounds=0, **options)
    widths = trellis.split_widths(rows, columns, Bits(bits))
    latent_t = trellis._rounded(weight_OI, trellis._Problem.of(statistics, config_t), widths, config_t)
    return latent_t.codes.values_OI, 8 * widths.nbytes(rows, columns) / weight_OI.numel()


def lost(found_OI: Tensor, weight_OI: Tensor, gram_II: Tensor) -> float:
    """Return the share of the energy of the output that is lost."""
    missing_OI = found_OI - weight_OI
    return float(((missing_OI @ gram_II) * missing_OI).sum() / ((weight_OI @ gram_II) * weight_OI).sum())


def measure(
    weights: dict[str, Tensor], learned: dict[str, Statistics], judged: dict[str, Statistics]
) -> list[dict[str, Any]]:
    """Return one row per case: bits, error by matrix and their geometric mean, and seconds."""
    rows = []
    for method, bits, options in CASES:
        began, errors, true_bits = time.process_time(), {}, []
        for name, weight_OI in weights.items():
            found_OI, own = rounded(method, bits, options, weight_OI, learned[name])
            errors[name] = round(lost(found_OI, weight_OI, judged[name].gram_II), 5)
            true_bits.append(own * weight_OI.numel())
        mean = math.exp(sum(math.log(error) for error in errors.values()) / len(errors))
        whole = sum(true_bits) / sum(weight_OI.numel() for weight_OI in weights.values())
        seconds = round(time.process_time() - began, 1)
        rows.append({"method": method, "options": options, "bits": round(whole, 3), "error": round(mean, 5)})
        rows[-1] |= {"errors": errors, "cpu_seconds": seconds}
        print(method, options, f"{whole:.3f} bits, error {mean:.4f}, {seconds} s", flush=True)
    return rows


def main() -> None:
    """Measure every case and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--block", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    block = model.model.layers[args.block]
    learned = grams(model, block, windows(args.data / "calibration.jsonl", tokenizer, LEARNED_WINDOWS))
    files = [args.data / name for name in ("eval_reviews.jsonl", "wikitext2_test.txt")]
    texts = [windows(file, tokenizer, JUDGED_WINDOWS) for file in files]
    judged = grams(model, block, torch.cat(texts))
    weights = {name: module.weight.detach() for name, module in block.named_modules() if name in learned}
    about = {"model": Path(args.model).name, "block": args.block, **provenance("cpu")}
    rows = measure(weights, learned, judged)
    args.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
