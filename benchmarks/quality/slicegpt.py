"""SliceGPT under the protocol of quality.py, as a peer of the structured methods.

    python -m benchmarks.quality.slicegpt MODEL DATA --out benchmarks/results/quality/quality-slicegpt-NAME.json

Source: Ashkboos et al. 2024, "SliceGPT: Compress Large Language Models by Deleting Rows and Columns". Before each
norm of a block, the residual stream is turned to its principal directions and the last ones are deleted. A square
matrix on the shortcut turns from one basis to the next.

To delete in another basis is to project in this one, so this script computes the quality without a turn. Before every
norm it projects the stream on the K principal directions of its input (float64, 1 % damping). Blocks follow one another
on inputs that are sliced already. LayerNorm takes its mean out first, as the paper folds it into the matrices before.

Not a method of niwaki: the result needs a model class of its own, and gains less than it loses (see the results). The
size counts every matrix with K for the width, and two K × K shortcuts per block. The head reads the whole stream, which
favours SliceGPT.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.common.perplexity import TEXTS, spread
from benchmarks.common.provenance import provenance
from niwaki.compression.walk import loaded_blocks
from niwaki.data.documents import read_texts
from niwaki.data.stream import Stream
from niwaki.data.texts import calibration_windows, evaluation_windows, load_tokenizer
from niwaki.measure.evaluate.evaluation import compare_windows
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.decoder import Block, Decoder
from niwaki.model.device import pick_device
from niwaki.model.logits import logits_of_part

MULTIPLE = 8  # of directions that stay, as in the released code


def norms_of(block: Block, stream: Stream) -> list[nn.Module]:
    """Return the modules that read the stream before attention and before the dense layer, in the order they run."""
    width, seen = stream.hidden.read(slice(0, 1)).shape[-1], []
    candidates = [m for m in block.module.modules() if all(p.shape == (width,) for p in m.parameters())]
    hooks = [
        module.register_forward_pre_hook(lambda module, _: seen.append(module))
        for module in candidates if list(module.parameters(recurse=False)) and not isinstance(module, nn.Linear)
    ]  # fmt: skip
    stream.observe(block, None, first_only=True)
    for hook in hooks:
        hook.remove()
    found = list(dict.fromkeys(seen))
    assert len(found) == 2, f"expected a block of two norms, got {found}"
    return found


def principal(gram_DD: Tensor, count: int) -> Tensor:
    """Return the `count` directions [D, K] with most energy."""
    damped_DD = gram_DD.clone()
    damped_DD.diagonal().add_(0.01 * damped_DD.diagonal().mean())
    return torch.linalg.eigh(damped_DD)[1][:, -count:]


class Projection:
    """Hook before a norm. First it sums the Gram matrix of its input, after `fix` it projects the stream in place."""

    def __init__(self, norm: nn.Module) -> None:
        self.centred = isinstance(norm, nn.LayerNorm)
        self.gram_DD: Tensor | None = None
        self.span_DK: Tensor | None = None
        self.hook = norm.register_forward_pre_hook(self)

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        (x_BTD,) = args
        read_BTD = x_BTD - x_BTD.mean(-1, keepdim=True) if self.centred else x_BTD
        if self.span_DK is not None:
            x_BTD.copy_(read_BTD @ self.span_DK @ self.span_DK.T)  # in place: the shortcut goes on from here
            return
        rows_ND = read_BTD.reshape(-1, read_BTD.shape[-1]).double()
        gram_DD = rows_ND.T @ rows_ND
        self.gram_DD = gram_DD if self.gram_DD is None else self.gram_DD + gram_DD

    def fix(self, count: int) -> None:
        """Fix the projection on the `count` principal directions."""
        assert self.gram_DD is not None
        self.span_DK = principal(self.gram_DD, count).float()


def counted(decoder: Decoder, count: int) -> float:
    """Return the share of parameters of the blocks that `count` directions remove. Norms are folded into matrices."""
    width, block = decoder.hidden_size, decoder.anatomy.blocks[0]
    left = block.weights * count / width + 2 * count**2
    return 1 - left / block.weights


def measure(decoder: Decoder, ids_ST: Tensor, texts: dict[str, Tensor], count: int) -> dict[str, float]:
    """Return the perplexities of the sliced model. All streams pass the blocks together."""
    stream = Stream(decoder, ids_ST)
    riders = {name: Stream(decoder, windows_ST) for name, windows_ST in texts.items()}
    for block in loaded_blocks(decoder):
        projections = []
        for norm in norms_of(block, stream):
            projections.append(Projection(norm))
            stream.observe(block, None)
            projections[-1].fix(count)
        for passing in (stream, *riders.values()):
            passing.advance(block)
        for projection in projections:
            projection.hook.remove()
        block.release()

    def perplexity(rider: Stream) -> float:
        """Return the perplexity of one text."""

        def logits(row: int, part: slice) -> list[Tensor]:
            """Return the logits of a part of the positions of one window."""
            at = slice(row, row + 1)
            return [logits_of_part(decoder.logits, rider.ids_ST[at], rider.hidden.read(at), part).float()]

        parts = decoder.position_slices(rider.ids_ST.shape[1])
        return compare_windows(rider.ids_ST, logits, parts)["perplexity"]

    return {name: perplexity(rider) for name, rider in riders.items()}


def main() -> None:
    """Measure every target and seed, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.2, 0.3, 0.5])
    args = parser.parse_args()
    decoder = Decoder(Checkpoint.open(args.model), pick_device(args.device), torch.float32)
    tokenizer = load_tokenizer(args.model)
    own = read_texts([str(args.data / "calibration.jsonl")])
    texts = {
        name: evaluation_windows(read_texts([str(args.data / file)]), tokenizer, seq_len=1024, max_tokens=50_000)
        for name, file in TEXTS.items()
    }
    few_ST = calibration_windows(own, tokenizer, samples=2, seq_len=512, seed=0)
    whole = measure(decoder, few_ST, texts, decoder.hidden_size)
    rows = []
    for target in args.targets:
        widths = range(decoder.hidden_size, 0, -MULTIPLE)
        count = next(k for k in widths if counted(decoder, k) >= target)
        runs = []
        for seed in range(args.seeds):
            begin = time.perf_counter()
            ids_ST = calibration_windows(own, tokenizer, samples=64, seq_len=512, seed=seed)
            found = measure(decoder, ids_ST, texts, count)
            runs.append({"seed": seed, "seconds": round(time.perf_counter() - begin, 1), "perplexity": found})
        row = {"label": "slicegpt", "target": str(target), "directions": count, "removed_frac": counted(decoder, count)}
        row |= {"runs": runs} | {name: spread([run["perplexity"][name] for run in runs]) for name in TEXTS}
        print(target, count, {name: round(row[name]["mean"], 2) for name in TEXTS}, flush=True)
        rows.append(row)
    about = {"model": Path(args.model).name, **provenance(args.device), "all_directions": whole}
    args.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
