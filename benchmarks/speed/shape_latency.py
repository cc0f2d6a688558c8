"""Times of the shapes of quality-structured-*.json: a prompt and some tokens, in turns with the dense model.

    python -m benchmarks.speed.shape_latency MODEL benchmarks/results/quality/quality-structured-NAME.json \\
        --out benchmarks/results/speed/latency-structured-NAME.json

Shapes are those of seed 0, built from MODEL's config with random weights, in plain transformers. Blocks with widths of
their own are resized as niwaki's loader does it. A shape that is stored in place with zeros is the dense one.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from benchmarks.common.decoders import decode, filled, prompt
from benchmarks.common.provenance import provenance
from niwaki.model.anatomy import discover
from niwaki.model.hf import build_skeleton, resize
from niwaki.model.prunable import PrunedShape, ShapeSpace


def shape_of(row: dict[str, Any], sizes: ShapeSpace) -> PrunedShape:
    """Return the shape that a row of a quality result records."""
    found = row["runs"][0]["shape"]
    if isinstance(found["neurons"], list):
        return PrunedShape(tuple(found["neurons"]), tuple(found["heads"]))
    return sizes.shape(found["neurons"], found["heads"], found["dropped"])


def build(sizes: ShapeSpace, shape: PrunedShape) -> Any:
    """Build a model of this shape in float32, the dense one if the shape cannot be cut."""
    full = sizes.shape(sizes.neurons, sizes.heads, shape.dropped if shape.whole else ())
    values = sizes.config_for(shape if shape.even else full)
    model: Any = build_skeleton(AutoConfig.for_model(values.pop("model_type"), **values), torch.float32)
    if shape.whole and not shape.even:
        resize(model, sizes.matrix_shapes(shape))
    return filled(model)


def main() -> None:
    """Measure all shapes in turns, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("quality", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    config = json.loads((args.model / "config.json").read_text())
    skeleton = build_skeleton(AutoConfig.from_pretrained(args.model), torch.float32)
    sizes = ShapeSpace(discover(skeleton), skeleton, config)
    quality = [row for row in json.loads(args.quality.read_text())["rows"] if "shape" in row["runs"][0]]
    shapes = {(row["target"], row["label"]): shape_of(row, sizes) for row in quality}
    models = {("0", "dense"): build(sizes, sizes.shape(sizes.neurons, sizes.heads))}
    models |= {key: build(sizes, shape) for key, shape in shapes.items()}
    times: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in models}
    for _ in range(args.rounds):
        for key, model in models.items():
            decode(model, 2)
            times[key].append((prompt(model, args.prompt_tokens), decode(model, args.tokens)))
    seconds = {key: [statistics.median(column) for column in zip(*found, strict=True)] for key, found in times.items()}
    dense = seconds["0", "dense"]
    rows = []
    for (target, label), (prompt_s, decode_s) in seconds.items():
        rows.append({
            "target": target, "label": label, "prompt_share": round(prompt_s / dense[0], 3),
            "decode_share": round(decode_s / dense[1], 3),
        })  # fmt: skip
        print(rows[-1], flush=True)
    what = f"share of dense seconds: prompt of {args.prompt_tokens}, {args.tokens} tokens, median of {args.rounds}"
    result = {"what": what, "model": args.model.name, **provenance("cpu"), "threads": torch.get_num_threads()}
    result |= {"dense_prompt_s": round(dense[0], 4), "dense_decode_s": round(dense[1], 4), "rows": rows}
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
