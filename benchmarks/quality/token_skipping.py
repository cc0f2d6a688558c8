"""Skipping by input at one budget of bytes: thresholds of `shadow` beside other ways, under a causal protocol.

    python -m benchmarks.quality.token_skipping MODEL DATA --out benchmarks/results/quality/token-skipping-NAME.json

Windows of 512 tokens: the first 128 run dense, the others skip, and they are scored. Calibration text alone decides
thresholds, shares and static masks; what is skipped at a token follows from this token and the ones before it. A target
is the share of the bytes of the decoder's weights that is not read. Rows give perplexity over that of the dense model,
divergence from it, and the share that was skipped.

- `shadow`: `niwaki compress --method shadow`, shares by damage over the whole model
- `shadow, weighted`: the same with `score=weighted`
- `shadow, local`: one share everywhere, which is TEAL without its search
- `teal, shares within a block`: every block leaves out the same bytes, its places by damage, as TEAL searches
- `shadow, thresholds of the prompt`: set again for every window, so that its prompt has the shares
- `cats`: neurons whose act(gate) is below a threshold lose their rows of `up` and columns of `down`; models with a gate
- `griffin`, `static fisher`, `dejavu`, `random`: heads and neurons fixed for a window, as in `contextual.py`

DATA holds calibration.jsonl, eval_reviews.jsonl and wikitext2_test.txt. The result is written after every row.
"""

import argparse
import json
import math
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from benchmarks.common.perplexity import TEXTS
from benchmarks.common.provenance import provenance
from benchmarks.common.units import Watch, dejavu_scores, fit_dejavu
from niwaki.compression.skipping import allocate, damages, run_trials
from niwaki.compression.traces import trace
from niwaki.data.documents import read_texts
from niwaki.data.stream import Stream
from niwaki.data.texts import calibration_windows, evaluation_windows, load_tokenizer
from niwaki.errors import NiwakiError
from niwaki.model.anatomy import find_blocks
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.decoder import Decoder
from niwaki.model.device import pick_device
from niwaki.runtime.contextual.places import find_places, skipped_frac
from niwaki.runtime.contextual.selection import Rule
from niwaki.runtime.contextual.traces import prompt_lengths
from niwaki.runtime.contextual.units import find_layout

LENGTH, PROMPT = 512, 128
TARGETS = (0.3, 0.5, 0.7)


class Judge:
    """Losses and divergence after the prompts of some windows, against the dense model."""

    def __init__(self, model, windows, batch: int) -> None:
        self.model, self.parts = model, windows.split(batch)
        self.dense = [self._logits(ids_BT).log_softmax(2) for ids_BT in self.parts]
        self.loss = sum(self._loss(log, ids) for log, ids in zip(self.dense, self.parts, strict=True)) / self.count

    @property
    def count(self) -> int:
        """Return the number of scored tokens."""
        return sum(ids_BT.shape[0] * (LENGTH - PROMPT - 1) for ids_BT in self.parts)

    def measure(self, masked) -> dict:
        """Return ratio and divergence; `masked(ids_BT)` is a context in which the model skips."""
        loss = divergence = 0.0
        for ids_BT, dense_BTV in zip(self.parts, self.dense, strict=True):
            with masked(ids_BT):
                found_BTV = self._logits(ids_BT).log_softmax(2)
            loss += self._loss(found_BTV, ids_BT)
            divergence += float((dense_BTV.exp() * (dense_BTV - found_BTV)).sum(dtype=torch.float64))
        return {
            "ratio": math.exp(min(loss / self.count - self.loss, 50.0)),
            "divergence": divergence / self.count,
        }

    def _logits(self, ids_BT):
        with torch.no_grad():
            keep = LENGTH - PROMPT
            return self.model(input_ids=ids_BT, use_cache=False, logits_to_keep=keep).logits[:, :-1].float()

    @staticmethod
    def _loss(log_BTV, ids_BT) -> float:
        wanted_N = ids_BT[:, PROMPT + 1 :].flatten()
        return float(cross_entropy(log_BTV.flatten(0, 1), wanted_N, reduction="sum"))


class Thresholds:
    """Context of forwards in which small inputs of the places are zero after the prompt; counts what is skipped."""

    def __init__(self, model, places, thresholds, shares=None) -> None:
        self.places, self.thresholds, self.shares = places, thresholds, shares
        self.blocks = find_blocks(model)[1]
        self.sums, self.forwards = [0.0] * len(places), 0

    @contextmanager
    def __call__(self, ids_BT):
        """Mask the forwards inside."""
        self.forwards += 1
        with ExitStack() as stack:
            for index, place in enumerate(self.places):
                hook = self._hook(index, ids_BT.shape)
                for name in place.names:
                    layer = self.blocks[place.block].get_submodule(name)
                    stack.callback(layer.register_forward_pre_hook(hook).remove)
            yield

    def _hook(self, index, shape):
        last = []

        def hook(_, args):
            if not last or last[0] is not args[0]:
                x_BTI = args[0].reshape(*shape, -1).clone()
                small_BTI = x_BTI[:, PROMPT:].abs() <= self._threshold(index, x_BTI[:, :PROMPT])
                self.sums[index] = self.sums[index] + small_BTI.float().mean()
                x_BTI[:, PROMPT:].masked_fill_(small_BTI, 0)
                last[:] = args[0], x_BTI.view(args[0].shape)
            return (last[1],)

        return hook

    def _threshold(self, index, prompt_BTI):
        """Return the threshold of a place, or those [B, 1, 1] that skip its share of the prompt."""
        if self.shares is None:
            return self.thresholds[index]
        size_BM = prompt_BTI.abs().flatten(1).sort().values
        place = min(int(self.shares[index] * size_BM.shape[1]), size_BM.shape[1] - 1)
        return size_BM[:, place, None, None]

    @property
    def skipped(self) -> float:
        """Return the share of the weights that was skipped."""
        return skipped_frac(self.places, [float(one) / max(self.forwards, 1) for one in self.sums])


def find_gates(model, ids_ST):
    """Return (gate layer, down layer, activation) of every block with a gate, else nothing."""
    found = []
    for block in find_blocks(model)[1]:
        layer = getattr(block, "mlp", None)
        if not all(hasattr(layer, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
            return []
        found.append((layer.gate_proj, layer.down_proj, layer.act_fn))
    return found


@contextmanager
def cats(gates, shape, thresholds, seen=None):
    """Set neurons whose act(gate) is small to zero after the prompt; with `seen`, keep the sizes and mask nothing."""
    with ExitStack() as stack:
        for index, (gate, down, act) in enumerate(gates):
            held = {}

            def keep(_, __, out, held=held, act=act, index=index):
                size_BTC = act(out).abs().reshape(*shape, -1)[:, PROMPT:]
                held["size"] = size_BTC
                if seen is not None:
                    seen.setdefault(index, []).append(size_BTC[:, ::8].flatten())

            def mask(_, args, held=held, index=index):
                x_BTC = args[0].reshape(*shape, -1).clone()
                x_BTC[:, PROMPT:].masked_fill_(held["size"] <= thresholds[index], 0)
                return (x_BTC.view(args[0].shape),)

            stack.callback(gate.register_forward_hook(keep).remove)
            if seen is None:
                stack.callback(down.register_forward_pre_hook(mask).remove)
        yield


def cats_thresholds(model, gates, ids_ST, share):
    """Return the size below which this share of act(gate) lies, by block."""
    seen = {}
    for ids_BT in ids_ST.split(8):
        with torch.no_grad(), cats(gates, ids_BT.shape, None, seen):
            model(input_ids=ids_BT.to(model.device), use_cache=False, logits_to_keep=1)
    return [
        torch.cat(seen[index]).sort().values[int(share * sum(map(len, seen[index])))] for index in range(len(gates))
    ]


def within_blocks(damage_PL, places, target):
    """Return shares by damage where every block leaves out the same share of its weights."""
    shares = [0.0] * len(places)
    for block in {place.block for place in places}:
        own = [index for index, place in enumerate(places) if place.block == block]
        found = allocate(damage_PL[own], [places[index] for index in own], target)
        for index, share in zip(own, found, strict=True):
            shares[index] = share
    return shares


def token_rows(decoder, model, places, ids_ST, judges, held):
    """Yield rows of thresholds of inputs, and of CATS."""

    def make(ids, name):
        return Stream(decoder, ids)

    by_size, weighted = (damages(decoder, places, ids_ST[:-held], make, weighted=flag) for flag in (False, True))
    ways = {
        "shadow": lambda target: allocate(by_size.damage_PL, places, target),
        "shadow, weighted": lambda target: allocate(weighted.damage_PL, places, target),
        "shadow, local": lambda target: [target] * len(places),
        "teal, shares within a block": lambda target: within_blocks(by_size.damage_PL, places, target),
    }
    names = [(label, target) for label in ways for target in TARGETS]
    shares = [ways[label](target) for label, target in names]
    trials = []
    for first in range(0, len(shares), len(TARGETS)):
        scales = weighted.scales if names[first][0] == "shadow, weighted" else None
        part = shares[first : first + len(TARGETS)]
        trials += run_trials(decoder, places, part, ids_ST[:16], ids_ST[-held:], make, scales=scales)
    for (label, target), trial in zip(names, trials, strict=True):
        row = {"label": label, "target": target, "trial": trial.ratio, "thresholds": "calibration"}
        for text, judge in judges.items():
            limits = trial.thresholds
            if label == "shadow, weighted":
                limits = [t / s.to(model.device) for t, s in zip(limits, weighted.scales, strict=True)]
            masked = Thresholds(model, places, limits)
            row[text] = judge.measure(masked) | {"skipped": masked.skipped}
        yield row
    for (label, target), trial in zip(names, trials, strict=True):
        if label == "shadow":
            row = {"label": "shadow, thresholds of the prompt", "target": target}
            for text, judge in judges.items():
                masked = Thresholds(model, places, None, trial.shares)
                row[text] = judge.measure(masked) | {"skipped": masked.skipped}
            yield row
    if gates := find_gates(model, ids_ST):
        whole, wide = sum(place.weights for place in places), sum(2 * down.weight.numel() for _, down, _ in gates)
        for target in TARGETS:
            share = target * whole / wide
            if share > 0.99:
                yield {"label": "cats", "target": target, "note": f"up and down are {wide / whole:.0%} of the weights"}
                continue
            limits = cats_thresholds(model, gates, ids_ST[:16], share)
            row = {"label": "cats", "target": target}
            for text, judge in judges.items():
                row[text] = judge.measure(lambda ids_BT, limits=limits: cats(gates, ids_BT.shape, limits))
            yield row


def unit_rows(decoder, model, ids_ST, judges, seed):
    """Yield rows of heads and neurons that are fixed for a window."""
    layout = find_layout(decoder.anatomy, decoder.model, 1)
    traces = trace(
        decoder, ids_ST, layout, ("fisher", "l2"), cuts=2, gradient_windows=len(ids_ST),
        make_stream=lambda ids, name: Stream(decoder, ids),
    )  # fmt: skip
    traces = {name: found.to(decoder.device) for name, found in traces.items()}
    watch = Watch(model, layout)
    dejavu = fit_dejavu(watch, ids_ST, prompt_lengths(LENGTH, 2), traces["l2"], decoder.device)
    static_U = traces["fisher"].score_NU.float().mean(0)
    generator = torch.Generator().manual_seed(seed)
    ways = {
        "griffin": lambda seen: seen["griffin"],
        "static fisher": lambda seen: static_U.expand(len(seen["griffin"]), -1),
        "dejavu": lambda seen: dejavu_scores(dejavu, seen, layout),
        "random": lambda seen: torch.rand(seen["griffin"].shape, generator=generator).to(static_U.device),
    }
    for label, scores in ways.items():
        for target in TARGETS:
            row = {"label": label, "target": target}
            for text, judge in judges.items():

                @contextmanager
                def masked(ids_BT, scores=scores, target=target):
                    """Fix the units by the prompt."""
                    seen = watch.observe(ids_BT, PROMPT)[1]
                    kept = dict(
                        zip(("heads", "neurons"), layout.split(Rule(target).select(scores(seen), layout)), strict=True)
                    )
                    with ExitStack() as stack:
                        for index, block in enumerate(watch.blocks):
                            for kind, unit in layout.units.items():
                                hook = unit_hook(kept[kind][:, index], ids_BT.shape)
                                layer = block.get_submodule(unit.consumer)
                                stack.callback(layer.register_forward_pre_hook(hook).remove)
                        yield

                row[text] = judge.measure(masked) | {"skipped": target}
            yield row


def unit_hook(kept_BG, shape):
    """Return a hook that sets skipped units to zero after the prompt."""

    def hook(_, args):
        x_BTC = args[0].reshape(*shape, -1).clone()
        keep_B1C = kept_BG.repeat_interleave(x_BTC.shape[2] // kept_BG.shape[1], dim=1)[:, None]
        x_BTC[:, PROMPT:] *= keep_B1C
        return (x_BTC.view(args[0].shape),)

    return hook


def main() -> None:
    """Measure all rows for every seed, and write the result after each row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=80, help="calibration windows")
    parser.add_argument("--held", type=int, default=16, help="of them for the trial")
    parser.add_argument("--tokens", type=int, default=32_768, help="of each text")
    parser.add_argument("--batch", type=int, default=16, help="windows of a forward")
    parser.add_argument("--seconds", type=float, default=1e9, help="after which no further row begins")
    args = parser.parse_args()
    started, device = time.time(), pick_device(args.device)
    torch.set_float32_matmul_precision("highest")
    decoder = Decoder(Checkpoint.open(args.model), device, torch.float32)
    model = (
        AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device).eval().requires_grad_(False)
    )
    places, tokenizer = find_places(decoder.anatomy), load_tokenizer(args.model)
    judges = {}
    for text, file in TEXTS.items():
        documents = read_texts([str(args.data / file)])
        windows = evaluation_windows(documents, tokenizer, seq_len=LENGTH, max_tokens=args.tokens).to(device)
        judges[text] = Judge(model, windows, args.batch)
    result = {"model": Path(args.model).name, **provenance(args.device), "prompt": PROMPT, "window": LENGTH}
    result |= {"tokens_scored": {text: judge.count for text, judge in judges.items()}, "samples": args.samples}
    result |= {"dense": {text: math.exp(judge.loss) for text, judge in judges.items()}, "rows": []}
    calibration = read_texts([str(args.data / "calibration.jsonl")])
    samples = {
        seed: calibration_windows(calibration, tokenizer, samples=args.samples, seq_len=LENGTH, seed=seed)
        for seed in args.seeds
    }
    parts = [(seed, token_rows(decoder, model, places, samples[seed], judges, args.held)) for seed in args.seeds]
    try:
        find_layout(decoder.anatomy, decoder.model, 1)
        parts += [(seed, unit_rows(decoder, model, samples[seed], judges, seed)) for seed in args.seeds]
    except NiwakiError as error:
        result["units"] = str(error)
    for seed, rows in parts:
        for row in rows:
            result["rows"].append({"seed": seed, **row})
            told = {text: round(row[text]["ratio"], 4) for text in judges if text in row}
            print(f"{time.time() - started:6.0f} s  seed {seed} {row['label']} {row['target']}: {told}", flush=True)
            result["seconds"] = round(time.time() - started, 1)
            args.out.write_text(json.dumps(result, indent=1) + "\n")
            if time.time() - started > args.seconds:
                return


if __name__ == "__main__":
    main()
