"""The cases that quality.py measures, by suite. Every suite of gaps begins with wanda, their zero point."""

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Case:
    """A recipe with a label that is unique for its target."""

    label: str
    recipe: dict = field(default_factory=dict)


def case(label: str, target: str, method: str = "", **more: object) -> Case:
    """Return a case whose method has the name of its label, unless `method` or a preset says otherwise."""
    by = {} if "preset" in more else {"method": method or label}
    return Case(label, {"target": target, **by, **more})


def wandas(*targets: str) -> list[Case]:
    """Return wanda at every target."""
    return [case("wanda", target) for target in targets]


def classic() -> list[Case]:
    """Return the methods that learn nothing."""
    found = []
    for target in ("0.5", "0.7", "2:4"):
        found += [case(method, target) for method in ("magnitude", "wanda", "sparsegpt")]
    found += [case(f"{method} owl", "0.7", method, allocation="owl") for method in ("wanda", "sparsegpt")]
    return [*found, case("sparsegpt", "4:8")]


def chain(label: str, target: str, method: str, **steps: dict) -> Case:
    """Return a case of several methods with options per method."""
    options = {f"{name}.{key}": value for name, given in steps.items() for key, value in given.items()}
    return case(label, target, method, options=options)


def learned() -> list[Case]:
    """Return the methods that learn, the presets, and their baselines."""
    found = wandas("2:4", "0.5", "0.7") + [case("sparsegpt", target) for target in ("2:4", "0.5", "0.7")]
    found += [case("wandapp", target) for target in ("2:4", "0.5")]
    found += [case("besa", target) for target in ("0.5", "0.7")]
    found += [case("wanda owl", "0.7", "wanda", allocation="owl"), case("besa owl", "0.7", "besa", allocation="owl")]
    for preset in ("fast", "balanced", "best"):
        found += [case(preset, target, preset=preset) for target in ("2:4", "0.5", "0.7")]
    return found


def varied(method: str, target: str, variants: dict[str, dict]) -> list[Case]:
    """Return one case per variant of the options of a method."""
    return [case(f"{method} {label}".strip(), target, method, options=options) for label, options in variants.items()]


def ablation_wandapp() -> list[Case]:
    """Return variants of score, mask, rate, rounds and target. `as published` keeps the published choices."""
    published = {"alpha": 100.0, "rounds": 5, "batch": 1, "optimizer": "rmsprop", "rate_frac": 1e-5}
    means: dict[str, dict] = {
        "": {},
        "score alone": {"rounds": 0},
        "score alone alpha 100": {"rounds": 0, "alpha": 100.0},
        "alpha 100": {"alpha": 100.0},
        "mask free": {"enforce_mask": False},
        "mask free alpha 100": {"enforce_mask": False, "alpha": 100.0},
    }
    found = wandas("2:4", "0.5")
    for target in ("2:4", "0.5"):
        found += varied(
            "wandapp",
            target,
            {
                "": {},
                "as published": published | {"enforce_mask": False},
                "score alone": {"rounds": 0},
                "score alone alpha 0.1": {"rounds": 0, "alpha": 0.1},
                "score alone alpha 10": {"rounds": 0, "alpha": 10.0},
                "score alone alpha 100": {"rounds": 0, "alpha": 100.0},
                "alpha 0": {"alpha": 0.0},
                "alpha 100": {"alpha": 100.0},
                "mask free": {"enforce_mask": False},
                "rmsprop": {"optimizer": "rmsprop", "rate_frac": 0.0125},
                "rate .0125": {"rate_frac": 0.0125},
                "rate .05": {"rate_frac": 0.05},
                "K 5": {"rounds": 5},
                "K 20": {"rounds": 20},
                "dense": {"target": "dense"},
                "both": {"target": "both"},
                "mask free alpha 100": {"enforce_mask": False, "alpha": 100.0},
                **{f"mean {label}".strip(): given | {"gradient": "mean"} for label, given in means.items()},
            },
        )
    return found


def ablation_besa() -> list[Case]:
    """Return variants of granularity, target, balance, steps, rates, budgets, and chains after besa."""
    found = wandas("0.5", "0.7")
    for target in ("0.5", "0.7"):
        found += varied(
            "besa",
            target,
            {
                "": {},
                "layer": {"granularity": "layer"},
                "dense": {"target": "dense"},
                "both": {"target": "both"},
                "shift": {"balance": "shift"},
                "segments 4": {"segments": 4},
                "steps 256 batch 1": {"steps": 256, "batch": 1},
                "steps 512 batch 2": {"steps": 512, "batch": 2},
                "width .1": {"width_frac": 0.1},
                "rate .1": {"rate": 0.1},
                "rate .4": {"rate": 0.4},
                "4 bit": {"quant_bits": 4},
                "4 bit groups of 128": {"quant_bits": 4, "quant_group": 128},
                "channel": {"normalize": "channel"},
                "released loss": {"normalize": "released"},
                "released loss batch 1": {"normalize": "released", "batch": 1},
                "batch 1": {"batch": 1},
                "surgeon": {"score": "surgeon"},
                "surgeon segments 4": {"score": "surgeon", "segments": 4},
                **{f"rank {rank}": {"lora_rank": rank} for rank in (4, 16, 64)},
                "rank 16 rate .003": {"lora_rank": 16, "lora_rate": 0.003},
                "rank 16 rate .03": {"lora_rank": 16, "lora_rate": 0.03},
                "rank 16 released loss": {"lora_rank": 16, "normalize": "released"},
                "rank 16 surgeon": {"lora_rank": 16, "score": "surgeon"},
            },
        )
        for spread in (0.02, 0.04, 0.06):
            options = {"owl_spread_frac": spread}
            found.append(case(f"besa owl {spread}", target, "besa", allocation="owl", options=options))
        found.append(chain("besa, refit", target, "besa+sparsegpt", sparsegpt={"refit": True}))
        found.append(case("besa+wandapp", target))
        learn = {"target": "both", "rate_frac": 0.0075, "rounds": 15, "samples": 64, "batch": 8}
        three = "besa+sparsegpt+wandapp"
        found.append(chain("besa, refit, learn", target, three, sparsegpt={"refit": True}, wandapp=learn))
    return found


def quantized() -> list[Case]:
    """Return all methods at their true bits, from 1.2 to 4.2."""
    bits, plain = (1.2, 1.4, 1.75, 2.0, 2.28, 2.95, 3.5), {"learn_rounds": 0}
    found = [case("squeeze10", f"{b}bit") for b in bits]
    found.append(case("squeeze10 learned longer", "1.75bit", "squeeze10", options={"learn_rounds": 16, "samples": 56}))
    found += [case("squeeze10 not learned", f"{b}bit", "squeeze10", options=plain) for b in bits]
    found.append(case("squeeze10 not learned, uniform", "1.75bit", "squeeze10", options=plain, allocation="uniform"))
    found.append(case("squeeze10 not learned, 1+4", "1.75bit", "squeeze10", options=plain | {"widths": "1+4"}))
    found += [case("billm", "3bit"), case("arb", "3.5bit"), case("ptq161", "2bit")]
    return found + grids()


def grids() -> list[Case]:
    """Return codes of one width in groups of 64: as published, by default, and learned in the block."""
    plain = {"rtn": {"clip": False}, "gptq": {"clip": False, "act_order": False, "rounds": 0, "damping_frac": 0.01}}
    found = []
    for target in ("2bit", "3bit", "4bit"):
        for name, options in plain.items():
            found.append(case(f"{name} g64", target, name, options={"group": 64, **options}))
            found.append(case(f"{name} g64 searched", target, name, options={"group": 64}))
        found += [case(preset, target, preset=preset) for preset in ("balanced", "best")]
    return found + [case("squeeze10", f"{bits}bit") for bits in (2.28, 3.3)]


def ablation_squeeze10() -> list[Case]:
    """Return variants of choice, staging, order, groups, widths, supervision, rounds and learning at 1.75 true bits."""
    four = {"widths": "1+4"}
    learn = {"learn_rounds": 30, "samples": 64, "batch": 8}
    choices = {f"choose {name}": four | {"choose": name} for name in ("activation", "surgeon", "magnitude", "random")}
    bare = four | {"rounds": 0}
    published = {
        "4 bits": four,
        **choices,
        "4 bits by eights": four | {"choose_columns": 8},
        "direct": four | {"staged": False},
        "salient last": four | {"salient_first": False},
        "no mean": four | {"mean": False},
        "groups of 128": four | {"group": 128},
        "rounds 2": four | {"rounds": 2},
        "rounds 20": four | {"rounds": 20},
        "full inputs": four | {"supervise": "inputs"},
        "full outputs": four | {"supervise": "outputs"},
        "learn": four | learn,
    }
    swept = {
        "no rounds": bare,
        **{f"no rounds {label}": given | bare for label, given in choices.items()},
        "no rounds direct": bare | {"staged": False},
        "no rounds by eights": bare | {"choose_columns": 8},
        "no rounds full inputs": bare | {"supervise": "inputs"},
        "no rounds full outputs": bare | {"supervise": "outputs"},
    }
    ours = {
        "": {},
        "3 bits": {"widths": "1+3"},
        "2 bits no mean": {"mean": False},
        "2 bits salient last": {"salient_first": False},
        "2 bits rounds 20": {"rounds": 20},
        "2 bits activation": {"choose": "activation"},
        "2 bits damping .05": {"damping_frac": 0.05},
        "2 bits full inputs": {"supervise": "inputs"},
        "2 bits full outputs": {"supervise": "outputs"},
        "2 bits half outputs": {"supervise": "outputs", "supervise_frac": 0.5},
        "2 bits learn": learn,
        "2 bits learn block": learn | {"target": "block"},
        "2 bits learn dense": learn | {"target": "dense"},
        "2 bits learn rate .01": learn | {"rate_frac": 0.01},
        "2 bits learn rate .02": learn | {"rate_frac": 0.02},
        "2 bits learn 60": learn | {"learn_rounds": 60},
        "2 bits learn half outputs": learn | {"supervise": "outputs", "supervise_frac": 0.5},
    }
    element = bare | {"granularity": "element"}
    by_element = varied(
        "squeeze10",
        "2.7bit",
        {
            "by element": element,
            "by element random": element | {"choose": "random"},
            "at the same bits": {},
            "at the same bits, one sweep": bare,
        },
    )
    cases = varied("squeeze10", "1.75bit", published | swept | ours) + by_element
    return [
        replace(c, recipe=c.recipe | {"allocation": "uniform", "options": {"learn_rounds": 0} | c.recipe["options"]})
        for c in cases
    ] + varied("squeeze10", "1.75bit", {"by need": {"learn_rounds": 0}, "by need, learned": {}})


LEARN_ROUNDS = 16  # of comp, when it learns


def structured() -> list[Case]:
    """Return comp by default, with its two options that cost more, and its peers (SliceGPT: slicegpt.py)."""
    methods = ("comp", "flap", "two_ssp", "wanda_sp", "shortgpt")
    more: dict[str, dict] = {
        "comp learned": {"options": {"learn_rounds": LEARN_ROUNDS}},
        "comp searched": {"allocation": "searched"},
        "comp searched, learned": {"allocation": "searched", "options": {"learn_rounds": LEARN_ROUNDS}},
    }
    found = []
    for target in ("0.2", "0.3", "0.5"):
        found += [case(label, target, "comp", **recipe) for label, recipe in more.items()]  # the slowest first
        found += [case(method, target) for method in methods]
    return found


def ablation_comp() -> list[Case]:
    """Return variants of score, tuning, target, split and damping at 30 % and 50 %. Only the last cases try splits."""
    fixed = {"try_blocks": 0, "try_heads": 0}
    variants = {
        "neurons alone": {},
        "energy": {"score": "energy"},
        "leverage": {"score": "leverage"},
        "random": {"score": "random"},
        "scales": {"tune": "scales"},
        "untuned": {"tune": "none"},
        "energy, scales": {"score": "energy", "tune": "scales"},
        "outputs": {"supervise": "outputs"},
        "half outputs": {"supervise": "outputs", "supervise_frac": 0.5},
        "one at a time": {"at_once": 1},
        "32 at once": {"at_once": 32},
        "128 at once": {"at_once": 128},
        "damping .001": {"damping_frac": 0.001},
        "damping .1": {"damping_frac": 0.1},
    }
    found = []
    for target in ("0.3", "0.5"):
        found += varied("comp", target, {label: fixed | options for label, options in variants.items()})
        found.append(case("comp heads too", target, "comp", options={"try_blocks": 0}))
    return found


def peers() -> list[Case]:
    """Return peers and niwaki at equal bits in groups of 64, the slowest first, and llm-compressor's pruning."""
    grids = [(bits, sym) for bits in (2, 3, 4) for sym in (False, True)]

    def on_grids(label: str, **recipe: object) -> list[Case]:
        """Return a case for every width, symmetric or not."""
        names = {(bits, sym): f"{label} symmetric" if sym else label for bits, sym in grids}
        if "peer" in recipe:
            own = {(bits, sym): {"bits": bits, "group": 64, "sym": sym} for bits, sym in grids}
        else:
            own = {(bits, sym): {"options": {"gptq.group": 64, "gptq.symmetric": sym}} for bits, sym in grids}
        return [Case(names[grid], {"target": f"{grid[0]}bit", **recipe, **own[grid]}) for grid in grids]

    found = on_grids("auto_round", peer="auto_round") + on_grids("best", preset="best")
    found += [case("squeeze10", f"{bits}bit") for bits in (2.28, 3.3, 4.3)]
    found += on_grids("gptqmodel", peer="gptqmodel") + on_grids("llmcompressor", peer="llmcompressor", method="gptq")
    found += on_grids("gptq", method="gptq")
    found += [Case("hqq", {"target": f"{bits}bit", "peer": "hqq", "bits": bits, "group": 64}) for bits in (2, 3, 4)]
    for target in ("2:4", "0.5"):
        mask = {"sparsity": 0.5} | ({"mask_structure": target} if ":" in target else {})
        for method in ("sparsegpt", "wanda"):
            peer = {"peer": "llmcompressor", "method": method, "options": mask}
            found += [Case(f"llmcompressor {method}", {"target": target, **peer}), case(method, target)]
    return found


def scores_comp() -> list[Case]:
    """Return comp with every score on a fixed shape, and with widths of each block and learning; flap to compare."""
    fixed = {"try_blocks": 0, "try_heads": 0}
    learn = {"learn_rounds": 16, "samples": 64, "batch": 4, "rate_frac": 0.008, "target": "both"}
    found = []
    for target in ("0.2", "0.3"):
        scores = ("surgeon", "gram_condition", "weight_condition", "pca", "energy", "leverage")
        found += varied("comp", target, {score: fixed | {"score": score, "learn_rounds": 0} for score in scores})
        found.append(case("comp learned longer", target, "comp", options=learn))
        found.append(case("comp damage", target, "comp", allocation="damage", options={"learn_rounds": 0}))
        found.append(case("comp damage, learned longer", target, "comp", allocation="damage", options=learn))
        found.append(case("flap", target))
    return found


def beyond() -> list[Case]:
    """Return what may help beyond the calibration's domain, each with and without: at 2:4, 2.28 and 2 bits."""
    books = {"calibration": {"held_out": "eval_books.jsonl"}}
    longer = {"learn_rounds": 24, "samples": 64, "batch": 4}
    scales = {"residual": "none", "heads": "none", "neurons": False, "scales": True}
    kl, ahead = {"wandapp.kl": 1}, {"wandapp.kl": 1, "wandapp.ahead": 2}
    grid = longer | {"group": 64}
    return [
        case("balanced", "2:4", preset="balanced"),
        case("balanced, kl 1", "2:4", preset="balanced", options=kl),
        case("balanced, kl 1, ahead 2", "2:4", preset="balanced", options=ahead),
        case("balanced, held out: books", "2:4", preset="balanced", **books),
        case("balanced, toward_dense", "2:4", preset="balanced", options={"sparsegpt.toward_dense": 1}),
        case("balanced, a tenth dense", "2:4@0.45", preset="balanced"),
        case("best", "2:4", preset="best"),
        case("best, kl 1, held out: books", "2:4", preset="best", options=kl, **books),
        case("trellis 24 rounds", "2.28bit", "trellis", options=longer),
        case("trellis 24 rounds, kl 1, held out: books", "2.28bit", "trellis", options=longer | {"kl": 1}, **books),
        case("gptq 24 rounds", "2bit", "gptq", options=grid),
        case("gptq 24 rounds, kl 1, held out: books", "2bit", "gptq", options=grid | {"kl": 1}, **books),
        case("gptq 24 rounds, toward_dense", "2bit", "gptq", options=grid | {"toward_dense": 1}),
        case("gptq 24 rounds, scales", "2bit", "gptq", options=grid, rotate=scales),
    ]


SUITES = {
    "beyond": beyond(),
    "peers": peers(),
    "scores-comp": scores_comp(),
    "structured": structured(),
    "ablation-comp": ablation_comp(),
    "classic": classic(),
    "learned": learned(),
    "ablation-wandapp": ablation_wandapp(),
    "ablation-besa": ablation_besa(),
    "quantized": quantized(),
    "grids": grids(),
    "ablation-squeeze10": ablation_squeeze10(),
}
