"""Speed of writing with a part of the model against the dense one, turn by turn in one run, on random weights.

    python -m benchmarks.speed.contextual_speed --shape 1B --out benchmarks/results/speed/contextual-speed-NAME.json

The real runtime path: a prompt of `--prompt` tokens, then `--new` tokens. The time includes the predictor, the choice
and the copies. The predictor has the size that `--method shadow` trains, and random numbers. `speedup` is that of the
whole with the prompt. `decode_speedup` is that of all after the prompt: dense steps over sparse steps and the choice.
Ratios are medians over repetitions, dense and sparse in turns.

On a CPU transformers' `generate` writes. On a GPU both sides run as CUDA graphs (`niwaki.runtime.cuda_graph`). With
`--compiled 1` torch.compile fuses the small operations of both sides. `--batch-neurons` is what the sequences of a
batch share (see `niwaki.runtime.contextual.selection`).
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import torch
import transformers

from benchmarks.common.provenance import provenance
from niwaki.measure.bench.models import random_model
from niwaki.measure.bench.variants import untrained
from niwaki.model.anatomy import discover
from niwaki.model.hf import build_skeleton
from niwaki.runtime.contextual.attach import attach
from niwaki.runtime.contextual.selection import Rule
from niwaki.runtime.cuda_graph import CudaGraphGenerator

SHAPES = {
    "1B": (16, 2048, 8192, 32, 8),
    "300M": (12, 1024, 4096, 16, 8),
    "7B": (32, 4096, 11008, 32, 32),
}


def build(shape, device, dtype):
    """Build a random model of a shape."""
    blocks, hidden, ffn, heads, groups = SHAPES[shape]
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=blocks,
        num_attention_heads=heads, num_key_value_heads=groups, max_position_embeddings=4096,
    )  # fmt: skip
    return random_model(config, dtype, torch.device(device))


class Clock:
    """Stop-watch of a text: seconds of its first forward, which reads the prompt, and of the whole."""

    def __init__(self, model):
        self.first = None
        model.register_forward_hook(self.tick)

    def tick(self, *_):
        """Note the end of the first forward."""
        if self.first is None:
            self.first = time.perf_counter()

    def generate(self, model, ids, new):
        """Generate, and return the seconds until the first token and of the whole."""
        self.first, start = None, time.perf_counter()
        model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
        return self.first - start, time.perf_counter() - start


def graphed(generator, ids, new):
    """Return seconds until the first token, with the choice and the copies of a part, and of the whole."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    logits, step = generator.prefill(ids)
    token = logits.argmax(-1, keepdim=True)
    torch.cuda.synchronize()
    first = time.perf_counter()
    for _ in range(new - 1):
        token = step.replay(token).argmax(-1, keepdim=True)
    torch.cuda.synchronize()
    return first - start, time.perf_counter() - start


def measure(write, contextual, repetitions):
    """Return medians and all seconds of dense and sparse texts, in turns. The first of each warms up."""
    times = {name: [] for name in ("dense", "sparse", "dense prompt", "sparse prompt")}
    for repetition in range(repetitions + 1):
        for name in ("dense", "sparse"):
            contextual.enabled = name == "sparse"
            prompt, whole = write()
            if repetition:
                times[name].append(whole)
                times[f"{name} prompt"].append(prompt)
    middle = {name: statistics.median(values) for name, values in times.items()}
    # With generate the choice comes after the prompt, with graphs before the first token. It counts here in both.
    decoding = {name: middle[name] - middle["dense prompt"] for name in ("dense", "sparse")}
    return {
        "seconds": middle,
        "all": times,
        "speedup": middle["dense"] / middle["sparse"],
        "decode_speedup": decoding["dense"] / decoding["sparse"],
    }


def main() -> None:
    """Measure every batch, target and way of running, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1B")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.3, 0.5, 0.7])
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--compiled", type=int, nargs="+", default=[0], choices=(0, 1))
    parser.add_argument("--batch-neurons", nargs="+", default=["union"])
    args = parser.parse_args()
    model = build(args.shape, args.device, getattr(torch, args.dtype))
    shadow = untrained(model, discover(build_skeleton(model.config, torch.float32)), 0.5)
    model.contextual = contextual = attach(model, shadow)
    options = {name: value for name, value in vars(args).items() if name != "out"}
    result = {**provenance(args.device), "options": options, "threads": torch.get_num_threads(), "rows": []}
    result["predictor_parameters"] = shadow.predictor.parameters
    clock = Clock(model)
    for batch, compiled, sharing, target in product(args.batches, args.compiled, args.batch_neurons, args.targets):
        if batch == 1 and sharing != args.batch_neurons[0]:
            continue
        ids = torch.randint(1, 32000, (batch, args.prompt), generator=torch.Generator().manual_seed(0)).to(args.device)
        contextual.shadow = replace(shadow, rule=Rule(target), running=replace(shadow.running, batch=sharing))
        if ids.is_cuda:
            generator = CudaGraphGenerator(model, room=args.prompt + args.new, compiled=bool(compiled))
            write = partial(graphed, generator, ids, args.new)
        else:
            write = partial(clock.generate, model, ids, args.new)
        row = {"batch": batch, "compiled": compiled, "neurons": sharing, "target": target}
        row |= measure(write, contextual, args.repetitions)
        record = contextual.records[-1]
        row |= {"skipped_frac": record.skipped_frac, "dense_because": record.dense_because}
        result["rows"].append(row)
        print(json.dumps({name: value for name, value in row.items() if name != "all"}), flush=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
