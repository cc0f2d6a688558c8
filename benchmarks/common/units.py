"""Units of a whole model, observed and masked by hooks, and the predictor of DejaVu for them.

A watch needs the layout of the units alone, so rivals with other choices run the same way. The predictor is one map per
block, from the output of its own heads at the last prompt token.

    logits_BTV, seen = Watch(model, layout).observe(ids_BT, prompt)
    scores_BU = dejavu_scores(fit_dejavu(watch, ids_ST, lengths, traces, device), seen, layout)
"""

from collections import defaultdict

import torch

from niwaki.model.anatomy import find_blocks
from niwaki.runtime.contextual.predictor import fit
from niwaki.runtime.contextual.traces import Traces
from niwaki.runtime.contextual.units import KINDS, UnitLayout


class Watch:
    """Hooks on a whole model, which observe the output of its units and mask it after the prompt."""

    def __init__(self, model, layout: UnitLayout) -> None:
        self.model, self.layout, self.blocks = model, layout, find_blocks(model)[1]

    def run(self, ids_BT, change, **kwargs):
        """Run the model with `change` applied to the output of all units, and return the logits."""
        handles = []
        for index, block in enumerate(self.blocks):
            for kind in KINDS:
                part = block.get_submodule(self.layout.units[kind].consumer)

                def hook(_, args, kind=kind, index=index):
                    """Change the input of the consumer of the units."""
                    x_BTC = args[0].reshape(*ids_BT.shape, -1)
                    changed = change(kind, index, x_BTC)
                    return None if changed is None else (changed.view(args[0].shape),)

                handles.append(part.register_forward_pre_hook(hook))
        try:
            with torch.no_grad():
                return self.model(input_ids=ids_BT, use_cache=False, **kwargs).logits.float()
        finally:
            for handle in handles:
                handle.remove()

    def masked(self, ids_BT, prompt, kept_BU, mean_fill):
        """Return the logits with only the kept units after the prompt."""
        kept = dict(zip(KINDS, self.layout.split(kept_BU), strict=True))

        def change(kind, index, x_BTC):
            size = x_BTC.shape[2] // self.layout.count(kind)
            keep_B1C = kept[kind][:, index].repeat_interleave(size, dim=1)[:, None]
            x_BTC = x_BTC.clone()
            mean_B1C = mean_fill * x_BTC[:, :prompt].mean(1, keepdim=True) if kind == "neurons" else 0.0
            x_BTC[:, prompt:] = torch.where(keep_B1C, x_BTC[:, prompt:], torch.as_tensor(mean_B1C).to(x_BTC))
            return x_BTC

        return self.run(ids_BT, change)

    def observe(self, ids_BT, prompt):
        """Return dense logits, `last` of every block, GRIFFIN's statistic, RMS of prompt and continuation."""
        found = defaultdict(dict)

        def change(kind, index, x_BTC):
            count = self.layout.count(kind)
            x_BTC = x_BTC.float()
            if kind == "heads":
                found["last"][index] = x_BTC[:, prompt - 1]
            if kind == "heads" and index == 0:
                found["mean"][0] = x_BTC[:, :prompt].mean(1)
            each_BTG = x_BTC.unflatten(2, (count, -1)).square().mean(3)
            share_BTG = each_BTG / each_BTG.sum(2, keepdim=True).clamp_min(1e-20)
            found["griffin"][kind, index] = share_BTG[:, :prompt].sum(1).sqrt()
            found["prompt"][kind, index] = each_BTG[:, :prompt].mean(1).sqrt()
            found["continuation"][kind, index] = each_BTG[:, prompt:].mean(1).sqrt()

        logits = self.run(ids_BT, change)
        blocks = range(self.layout.blocks)
        rows = {
            name: self.layout.join(*(torch.stack([found[name][kind, i] for i in blocks], 1) for kind in KINDS))
            for name in ("griffin", "prompt", "continuation")
        }
        last_BLD = torch.stack([found["last"][i] for i in blocks], 1)
        return logits, {"last": last_BLD, "mean": found["mean"][0], **rows}


def fit_dejavu(watch, ids_ST, lengths, l2: Traces, device):
    """Fit one predictor of ‖h‖ for every block, from the block's own heads at the last prompt token."""
    layout, fitted = watch.layout, []
    last = [[] for _ in lengths]
    for ids_BT in ids_ST.split(16):
        for place, length in enumerate(lengths):
            last[place].append(watch.observe(ids_BT[:, : length + 1].to(device), length)[1]["last"])
    last_NLD = torch.stack([torch.cat(part) for part in last], 1).flatten(0, 1)
    parts = [layout.split(part) for part in (l2.prompt_NU.float(), l2.score_NU.float())]
    one = UnitLayout(1, layout.units, layout.width, layout.weights)
    sensitivity_U = torch.ones(one.size, device=device)
    for index in range(layout.blocks):
        prompt_NU, score_NU = (one.join(*(kind[:, index : index + 1] for kind in part)) for part in parts)
        samples = Traces(last_NLD[: len(score_NU), index], l2.mean_ND, prompt_NU, score_NU, sensitivity_U)
        fitted.append(fit(samples, one, ("last",), False, 64)[0])
    return fitted


def dejavu_scores(fitted, seen, layout):
    """Return the scores of all units by the predictors of the blocks."""
    one = UnitLayout(1, layout.units, layout.width, layout.weights)
    parts = []
    for index, predictor in enumerate(fitted):
        blank = torch.zeros(len(seen["last"]), one.size, device=seen["last"].device)
        parts.append(one.split(predictor.scores(seen["last"][:, index], seen["mean"], blank)))
    return layout.join(*(torch.cat([part[place] for part in parts], 1) for place in range(2)))
