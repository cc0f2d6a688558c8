"""Experts with few calibration tokens: errors with and without the tokens of the other experts.

    python -m benchmarks.quality.experts DATA --out benchmarks/results/quality/experts.json

The mixture is upcycled from the embedded model: eight copies of every MLP with two for a token, and routers at random.
With --steps it is trained on DATA/calibration.jsonl, seeded, so that experts and routers differ. One block is then
compressed on few tokens of the same file, with `expert_tokens` from 0 up. Other texts (DATA/eval_reviews.jsonl) judge
the outputs of each matrix of each expert, on the tokens that the router sends to it.

With --perplexity all blocks are compressed, and the perplexity on these texts is measured too. Beside it stand that of
the dense mixture, and of the shares of tokens in DATA/calibration.jsonl alone (unigram). The trained mixture:

    python -m benchmarks.quality.experts DATA --steps 480 --seeds 3 --perplexity --expert-tokens 0 256 \
        --out benchmarks/results/quality/experts-trained.json
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import niwaki
from benchmarks.common.provenance import provenance
from niwaki.cli.demo import sapling
from niwaki.data.documents import read_texts
from niwaki.data.stream import Stream
from niwaki.data.texts import calibration_windows, evaluation_windows, load_tokenizer
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.decoder import Decoder

EXPERTS, ACTIVE, SEQ_LEN, BATCH, RATE = 8, 2, 128, 4, 3e-4
WIDTH = 256  # inputs of an expert
PUBLISHED = {"group": 64, "clip": False, "act_order": False, "rounds": 0, "damping_frac": 0.01}
METHODS: dict[str, dict[str, Any]] = {
    "sparsegpt, 60 %": {"method": "sparsegpt", "target": "0.6"},
    "gptq as published, 2 bits": {"method": "gptq", "target": "2bit", "options": PUBLISHED},
    "wanda, 60 %": {"method": "wanda", "target": "0.6"},
}


def train(folder: Path, data: Path, steps: int) -> dict[str, Any]:
    """Make the mixture of the embedded model, train it, save it to `folder`, and return its facts."""
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_pretrained(sapling(), dtype=torch.float32)
    about = dense.config
    config = MixtralConfig(
        vocab_size=about.vocab_size, hidden_size=about.hidden_size, intermediate_size=about.intermediate_size,
        num_hidden_layers=about.num_hidden_layers, num_attention_heads=about.num_attention_heads,
        num_key_value_heads=about.num_key_value_heads, head_dim=about.head_dim, rms_norm_eps=about.rms_norm_eps,
        rope_parameters=about.rope_parameters, max_position_embeddings=about.max_position_embeddings,
        tie_word_embeddings=True, num_local_experts=EXPERTS, num_experts_per_tok=ACTIVE, bos_token_id=0,
        eos_token_id=0, sliding_window=None,
    )  # fmt: skip
    model = MixtralForCausalLM(config).train()
    missing = model.load_state_dict(dense.state_dict(), strict=False).missing_keys
    assert missing and all(".mlp." in name for name in missing), missing
    with torch.no_grad():
        for layer, source in zip(model.model.layers, dense.model.layers, strict=True):
            layer.mlp.gate.weight.normal_(0, config.hidden_size**-0.5)
            layer.mlp.experts.gate_up_proj.copy_(torch.cat([source.mlp.gate_proj.weight, source.mlp.up_proj.weight]))
            layer.mlp.experts.down_proj.copy_(source.mlp.down_proj.weight)
    texts = read_texts([str(data / "calibration.jsonl")], "text")
    ids_ST = calibration_windows(
        texts, load_tokenizer(sapling()), samples=max(steps, 1) * BATCH, seq_len=SEQ_LEN, seed=0
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    losses = []
    for step in range(steps):
        rows = slice(step * BATCH, (step + 1) * BATCH)
        loss = model(input_ids=ids_ST[rows], labels=ids_ST[rows]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(sapling() / name, folder / name)
    ends = [round(mean(losses[first:][:20]), 3) for first in (0, -20)] if losses else []
    return {"steps": steps, "tokens": steps * BATCH * SEQ_LEN, "losses": ends}


def heldout_errors(model: Path, out: Path, data: Path, block: int, windows: int) -> dict[tuple[int, str], float]:
    """Return the relative squared error of the outputs of each matrix of each expert, on the tokens that reach it."""
    decoders = [Decoder(Checkpoint.open(folder), torch.device("cpu")) for folder in (model, out)]
    texts = read_texts([str(data / "eval_reviews.jsonl")], "text")
    ids_ST = evaluation_windows(texts, load_tokenizer(model), seq_len=SEQ_LEN, max_tokens=windows * SEQ_LEN)
    stream = Stream(decoders[0], ids_ST)
    for index in range(block):
        before = decoders[0].load(index)
        stream.advance(before)
        before.release()
    dense, changed = (decoder.load(block) for decoder in decoders)
    wrong: dict[tuple[int, str], list[float]] = {}

    def seen(name: str, x_NI: Tensor) -> None:
        linear = dense.linears[name]
        if linear.expert is not None and len(x_NI):
            wanted_NO = x_NI @ dense.weight(name).T
            error = (x_NI @ changed.weight(name).T - wanted_NO).square().sum()
            sums = wrong.setdefault((linear.expert, name.rpartition(".")[2]), [0.0, 0.0])
            sums[0] += float(error)
            sums[1] += float(wanted_NO.square().sum())

    stream.advance(dense, None, seen)
    return {key: error / energy for key, (error, energy) in wrong.items()}


def perplexity(model: Path, args: argparse.Namespace) -> float:
    """Return the perplexity on the held-out texts."""
    file = str(args.data / "eval_reviews.jsonl")
    found = niwaki.evaluate(model, data=file, seq_len=SEQ_LEN, max_tokens=args.held * SEQ_LEN, device="cpu")
    return round(found["perplexity"][file], 3)


def unigram(model: Path, args: argparse.Namespace) -> float:
    """Return the perplexity of the shares of tokens in the text of the training, every token counted once more."""
    tokenizer, counts = load_tokenizer(model), torch.ones(Checkpoint.open(model).config.vocab_size)
    for text in read_texts([str(args.data / "calibration.jsonl")], "text"):
        ids_N = torch.tensor(tokenizer(str(text))["input_ids"])
        counts += ids_N.bincount(minlength=len(counts))
    texts = read_texts([str(args.data / "eval_reviews.jsonl")], "text")
    ids_ST = evaluation_windows(texts, tokenizer, seq_len=SEQ_LEN, max_tokens=args.held * SEQ_LEN)
    return round(float((counts / counts.sum()).log()[ids_ST[:, 1:]].mean().neg().exp()), 1)


def main() -> None:
    """Make or read the mixture, then measure every case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="The mixture, or the new folder for it.")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--block", type=int, default=2)
    parser.add_argument("--windows", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--expert-tokens", type=int, nargs="+", default=[0, 64, 256, 1024])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--held", type=int, default=32, help="Windows of other texts.")
    parser.add_argument("--perplexity", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        model, started = args.model or Path(place) / "mixture", time.perf_counter()
        trained = {} if model.is_dir() else train(model, args.data, args.steps)
        rows: list[dict[str, Any]] = []
        result = {
            "what": "held-out errors of the matrices of experts, by tokens of the other experts (expert_tokens)",
            **provenance("cpu"),
            "trained": trained | {"seconds": round(time.perf_counter() - started, 1)},
            "experts": EXPERTS,
            "active": ACTIVE,
            "block": args.block,
            "rows": rows,
        }
        if args.perplexity:
            result["dense"] = {"perplexity": perplexity(model, args), "unigram": unigram(model, args)}
        for windows in args.windows:
            for label in args.methods:
                for expert_tokens in args.expert_tokens:
                    rows.append(_row(model, args, Path(place), label, windows, expert_tokens))
                    args.out.write_text(json.dumps(result, indent=1) + "\n")
                    print(rows[-1], flush=True)


def _row(
    model: Path, args: argparse.Namespace, place: Path, label: str, windows: int, expert_tokens: int
) -> dict[str, Any]:
    """Compress with every seed, and return the errors of the experts by their number of tokens."""
    errors: dict[str, list[float]] = {"few": [], "enough": []}
    perplexities = []
    for seed in range(args.seeds):
        out, files = place / "out", (str(args.data / "calibration.jsonl"),)
        calibration = {"files": files, "samples": windows, "seq_len": SEQ_LEN}
        blocks = None if args.perplexity else args.block
        record = niwaki.compress(
            model, out, **METHODS[label], calibration=calibration, seed=seed, pack="none", device="cpu",
            expert_tokens=expert_tokens, blocks=blocks, overwrite=True,
        )  # fmt: skip
        tokens = record["experts"][str(args.block)]
        for (expert, _), error in heldout_errors(model, out, args.data, args.block, args.held).items():
            errors["few" if tokens[expert] < WIDTH else "enough"].append(error)
        if args.perplexity:
            perplexities.append(perplexity(out, args))
    row = {
        "method": label,
        "calibration_tokens": windows * SEQ_LEN,
        "tokens_of_the_experts": tokens,
        "expert_tokens": expert_tokens,
        "seeds": args.seeds,
        "error": {name: round(mean(values), 5) for name, values in errors.items() if values},
    }
    return row | ({"perplexity": round(mean(perplexities), 3)} if perplexities else {})


if __name__ == "__main__":
    main()
