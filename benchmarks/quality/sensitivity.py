"""Agreement of `niwaki inspect MODEL --sensitivity` with the damage of compressing one block at a time.

    python -m benchmarks.quality.sensitivity MODEL DATA --out benchmarks/results/quality/sensitivity-NAME.json

Every recipe compresses each block of the dense model on its own inputs, all other blocks stay dense. The damage is the
rise of the loss on a text that nothing was measured on. Agreement is Spearman's rank correlation over the blocks of
the damage with each measure. DATA as for quality.py.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.common.perplexity import TEXTS
from benchmarks.common.provenance import provenance
from niwaki.compression.sensitivity import measure_sensitivity
from niwaki.compression.walk import collect, forward
from niwaki.config.recipe import Calibration
from niwaki.config.targets import parse_target
from niwaki.data.documents import read_texts
from niwaki.data.stream import CalibrationData, Stream
from niwaki.data.texts import evaluation_windows, load_tokenizer, windows_for
from niwaki.methods.registry import make_steps, merged_needs
from niwaki.model.decoder import Block, open_decoder

RECIPES = {
    "squeeze10 80/20": ("squeeze10", "8bit", {"salient_frac": 0.2, "rounds": 0, "learn_rounds": 0}),
    "gptq 2 bits": ("gptq", "2bit", {"group": 64}),
    "rtn 3 bits": ("rtn", "3bit", {"group": 64}),
    "wanda 2:4": ("wanda", "2:4", {}),
    "wanda 70 %": ("wanda", "0.7", {}),
}
Weights = dict[str, Tensor]


def spearman(first: list[float], second: list[float]) -> float:
    """Return the rank correlation of two lists without ties."""
    ranks = [torch.tensor(values, dtype=torch.float64).argsort().argsort().double() for values in (first, second)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def compressed_blocks(model: str, ids_ST: Tensor, device: torch.device) -> dict[str, list[Weights]]:
    """Return the weights of every block by recipe, each block compressed on its inputs in the dense model."""
    decoder = open_decoder(model, device, torch.float32)
    steps = {
        label: make_steps(name, options, parse_target(target))[0] for label, (name, target, options) in RECIPES.items()
    }
    stream, needs = Stream(decoder, ids_ST), merged_needs(list(steps.values()))
    found: dict[str, list[Weights]] = {label: [] for label in RECIPES}

    def visit(block: Block) -> None:
        calib = CalibrationData(collect(block, stream, needs)[0], stream)
        prefix = decoder.anatomy.prefix(block.index)
        for label, step in steps.items():
            targets = dict.fromkeys(block.linears, parse_target(RECIPES[label][1]))
            records = step.compress(block, calib, targets, torch.Generator().manual_seed(block.index))
            found[label].append({f"{prefix}{name}": record.decode(torch.float32) for name, record in records.items()})

    forward(decoder, [stream], visit)
    return found


@torch.no_grad()
def loss(model: torch.nn.Module, ids_ST: Tensor) -> float:
    """Return the mean loss per token."""
    return sum(float(model(input_ids=ids, labels=ids).loss) for ids in ids_ST.split(1)) / len(ids_ST)


@torch.no_grad()
def damage(model: torch.nn.Module, weights: Weights, texts: dict[str, Tensor], dense: dict[str, float]) -> dict:
    """Return the rise of the loss on each text with these weights in place, and put the dense ones back."""
    parameters = {name: model.get_parameter(f"{name}.weight") for name in weights}
    before = {name: parameter.clone() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])
    risen = {text: loss(model, ids_ST) - dense[text] for text, ids_ST in texts.items()}
    for name, parameter in parameters.items():
        parameter.copy_(before[name])
    return risen


def main() -> None:
    """Measure the sensitivity, the damage of every recipe and block, and their agreement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--windows", type=int, default=24, help="of 512 tokens, of each evaluation text")
    args = parser.parse_args()
    device = torch.device(args.device)
    calibration = Calibration(files=(str(args.data / "calibration.jsonl"),), samples=args.samples, seq_len=512)
    found = measure_sensitivity(args.model, calibration=calibration, device=args.device, dtype="float32")
    decoder = open_decoder(args.model, device, torch.float32)
    ids_ST = windows_for(calibration, decoder, seed=0, report=lambda event, **fields: None).ids_ST
    new = compressed_blocks(args.model, ids_ST, device)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device).eval()
    tokenizer = load_tokenizer(args.model)
    texts = {
        name: evaluation_windows(
            read_texts([str(args.data / file)]), tokenizer, seq_len=512, max_tokens=512 * args.windows
        ).to(device)
        for name, file in TEXTS.items()
    }
    dense = {name: loss(model, ids) for name, ids in texts.items()}
    lost = [[entry["lost"] or 0.0 for entry in block["matrices"].values()] for block in found["blocks"]]
    measures = {
        "damage (rise of the loss on the calibration text)": [block["damage"] for block in found["blocks"]],
        "2-bit error of the block": [block["error"] for block in found["blocks"]],
        "1-bit loss of its matrices (PBAR), mean": [sum(own) / len(own) for own in lost],
    }
    rows = []
    for label, blocks in new.items():
        risen = [damage(model, weights, texts, dense) for weights in blocks]
        by_text = {name: [row[name] for row in risen] for name in texts}
        agreement = {
            measure: {name: spearman(values, own) for name, own in by_text.items()}
            for measure, values in measures.items()
        }
        rows.append({"recipe": label, "damage": by_text, "agreement": agreement})
        print(label, agreement, flush=True)
    about = {"model": Path(args.model).name, **provenance(args.device), "dense_loss": dense, "measures": measures}
    args.out.write_text(json.dumps(about | {"kinds": found["kinds"], "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
