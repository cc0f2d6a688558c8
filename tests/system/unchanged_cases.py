"""The compressions of the proof: {name: model and flags}, every method with every kind of target that it meets."""

CALIBRATED = "--calibration calibration.jsonl --samples 8 --seq-len 64"
BRIEF = "--calibration calibration.jsonl --samples 6 --seq-len 32"
# The learned steps stay, in fewer rounds.
BESA = "--set besa.steps=3"
WANDAPP = "--set wandapp.rounds=1 --set wandapp.samples=4"
# Since 30 November 2026 the defaults of gptq and rtn are not the published forms. These are, with the bytes of before.
RTN, GPTQ = "--set clip=false", "--set clip=false --set act_order=false --set rounds=0 --set damping_frac=0.01"
CHAINED_RTN, CHAINED_GPTQ = RTN.replace("--set ", "--set rtn."), GPTQ.replace("--set ", "--set gptq.")
SQUEEZE = "--set rounds=2 --set learn_rounds=1 --set samples=4"

ZEROS = {
    "magnitude 0.5": "short --method magnitude --target 0.5",
    "magnitude 30%": "short --method magnitude --target 30%",
    "magnitude 2:4": "short --method magnitude --target 2:4",
    "magnitude row 0.5": "short --method magnitude --target 0.5 --set scope=row",
    "wanda 0.5": "short --method wanda --target 0.5",
    "wanda 2:4": "short --method wanda --target 2:4",
    "wanda 4:8": "short --method wanda --target 4:8",
    "wanda 0.6 owl": "short --method wanda --target 0.6 --allocation owl",
    "sparsegpt 0.5": "short --method sparsegpt --target 0.5",
    "sparsegpt 2:4": "short --method sparsegpt --target 2:4",
    "sparsegpt 4:8": "short --method sparsegpt --target 4:8",
    "sparsegpt 0.5 owl": "short --method sparsegpt --target 0.5 --allocation owl",
    "sparsegpt 2:4 options": "short --method sparsegpt --target 2:4 --set refit=true --set panel_columns=64 --seed 3",
    "sparsegpt 2:4 exchanges": "short --method sparsegpt --target 2:4 --set exchanges=2",
    "sparsegpt 2:4 dense stream": "short --method sparsegpt --target 2:4 --dense-stream",
    "sparsegpt 2:4 bfloat16": "short1 --method sparsegpt --target 2:4 --dtype bfloat16",
    "sparsegpt 2:4 mapped": "short --method sparsegpt --target 2:4 --activation-bytes 0 --batch-tokens 128",
    "sparsegpt 2:4 sapling": "sapling --method sparsegpt --target 2:4",
    "sparsegpt 0.5 pack": "short --method sparsegpt --target 0.5 --pack auto",
    "sparsegpt 2:4 pack": "short --method sparsegpt --target 2:4 --pack auto",
    "wandapp 0.5": "short1 --method wandapp --target 0.5 --set rounds=1 --set samples=4",
    "wandapp 2:4": "short1 --method wandapp --target 2:4 --set rounds=1 --set samples=4 --set optimizer=rmsprop",
    "wandapp 4:8 both": "short1 --method wandapp --target 4:8 --set rounds=1 --set samples=4 --set target=both",
    "besa 0.5": "short1 --method besa --target 0.5 --set steps=3",
    "besa 0.5 layer": "short1 --method besa --target 0.5 --set steps=2 --set granularity=layer --set target=dense",
    "besa 0.5 bits": "short1 --method besa --target 0.5 --set steps=2 --set quant_bits=4 --set balance=shift",
    "gblm 0.5": "short --method gblm --target 0.5",
    "gblm 2:4": "short --method gblm --target 2:4 --set alpha=10",
}
BITS = {
    **{f"rtn {bits}bit": f"short --method rtn --target {bits}bit {RTN}" for bits in (2, 3, 4, 8)},
    "rtn 4bit options": "short --method rtn --target 4bit --set group=32 --set symmetric=true --set clip=true",
    "rtn 4bit pack none": f"short --method rtn --target 4bit --pack none {RTN}",
    **{f"gptq {bits}bit": f"short --method gptq --target {bits}bit {GPTQ}" for bits in (2, 3, 4, 8)},
    "gptq 4bit options": "short1 --method gptq --target 4bit --set group=32",
    "gptq 2bit learned": "short1 --method gptq --target 2bit --set learn_rounds=1 --set samples=4",
    "rtn 2bit fitted": "short1 --method rtn --target 2bit",
    "gptq 3bit rounds": f"short1 --method gptq --target 3bit {GPTQ} --set rounds=1",
    "gptq 4bit ends": f"short --method gptq --target 4bit --ends 4bit {GPTQ}",
    "rtn 4bit untied ends": "llama-wide --method rtn --target 4bit --set group=0 --ends 8bit --set clip=false",
    "squeeze10 1.6bit": f"short --method squeeze10 --target 1.6bit {SQUEEZE}",
    "squeeze10 1.6bit uniform": f"short1 --method squeeze10 --target 1.6bit --allocation uniform {SQUEEZE}",
    "squeeze10 2.2bit keep": f"short --method squeeze10 --target 2.2bit --keep-blocks 1 {SQUEEZE}",
    "squeeze10 2bit keep auto": f"short --method squeeze10 --target 2bit --keep-blocks auto {SQUEEZE}",
    "squeeze10 bytes": f"short --method squeeze10 --target-bytes 600KB {SQUEEZE}",
    "squeeze10 2.5bit element": "short1 --method squeeze10 --target 2.5bit --set granularity=element --set widths=1+4 "
    "--set rounds=0 --set learn_rounds=0",
    "billm 3bit": "short1 --method billm --target 3bit",
    "arb 3.2bit": "short1 --method arb --target 3.2bit --set iterations=3",
    "ptq161 2bit": "short1 --method ptq161 --target 2bit --set rounds=1 --set samples=4",
}
SHAPES = {
    "comp 0.3": "short --method comp --target 0.3 --set try_blocks=1 --set try_heads=1",
    "comp 0.3 searched": "short --method comp --target 0.3 --allocation searched --set try_blocks=0 --set try_heads=0",
    "comp 0.3 learned": "short --method comp --target 0.3 --set try_blocks=0 --set learn_rounds=1 --set samples=4 "
    "--set batch=2 --set rate_frac=0.004 --set target=block",
    "comp 0.3 pack none": "short --method comp --target 0.3 --set try_blocks=1 --set try_heads=0 --pack none",
    "shortgpt 0.3": "short --method shortgpt --target 0.3",
    "wanda_sp 0.3": "short --method wanda_sp --target 0.3",
    "flap 0.3": "short --method flap --target 0.3",
    "flap 0.2 bare": "short --method flap --target 0.2 --set compensate=false",
    "two_ssp 0.3": "short --method two_ssp --target 0.3",
    "shadow 0.5": "short --method shadow --target 0.5 --set unit=prompt --set scope=local",
    "shadow 0.3 options": "short --method shadow --target 0.3 --set unit=prompt --set scope=global "
    "--set neuron_width=32 "
    "--set head_criterion=plainact --set criterion=energy --set features=last",
}
CHAINS = {
    "besa+wandapp 0.5": f"short1 --method besa+wandapp --target 0.5 {BESA} {WANDAPP}",
    "sparsegpt+gptq 2:4+4bit": f"short --method sparsegpt+gptq --target 2:4+4bit {CHAINED_GPTQ}",
    "sparsegpt+gptq 2:4+4bit pack": f"short --method sparsegpt+gptq --target 2:4+4bit --pack auto {CHAINED_GPTQ}",
    "sparsegpt+gptq 0.5+3bit pack": f"short --method sparsegpt+gptq --target 0.5+3bit --pack auto {CHAINED_GPTQ}",
    "sparsegpt+rtn 0.5+8bit pack": f"short --method sparsegpt+rtn --target 0.5+8bit --pack auto {CHAINED_RTN}",
    "wanda+gptq joint pack": "short --method wanda+gptq --target 2:4+4bit --pack auto --set gptq.joint=true "
    f"{CHAINED_GPTQ}",
    "wandapp+gptq pack": f"short1 --method wandapp+gptq --target 0.5+4bit --pack auto {WANDAPP} {CHAINED_GPTQ}",
    "besa+gptq pack": f"short1 --method besa+gptq --target 0.5+4bit --pack auto {BESA} {CHAINED_GPTQ}",
    "magnitude+sparsegpt+rtn pack": "short --method magnitude+sparsegpt+rtn --target 4:8+4bit --pack auto "
    f"{CHAINED_RTN}",
    "magnitude+sparsegpt 0.5": "short1 --method magnitude+sparsegpt --target 0.5",
    "comp+gptq 0.25+4bit": f"short --method comp+gptq --target 0.25+4bit --set comp.try_blocks=0 {CHAINED_GPTQ}",
    "comp+magnitude+rtn": "short --method comp+magnitude+rtn --target 0.3+2:4+4bit --pack auto "
    f"--set comp.try_blocks=0 --set comp.try_heads=0 {CHAINED_RTN}",
    "wanda_sp+sparsegpt 0.2+2:4": "short --method wanda_sp+sparsegpt --target 0.2+2:4",
    "flap+rtn 0.2+8bit": f"short --method flap+rtn --target 0.2+8bit --set rtn.group=0 {CHAINED_RTN}",
    "preset fast 2:4": "short --preset fast --target 2:4",
    "preset balanced 2:4": f"short1 --preset balanced --target 2:4 {WANDAPP} --set wandapp.kl=0",
    "preset best 0.5": f"short1 --preset best --rotate none --target 0.5 {WANDAPP} --set wandapp.batch=2 "
    "--set wandapp.kl=0 --set wandapp.rate_frac=0.0075",
}
FAMILIES = {
    f"family {name} {method}": f"{name} --method {method} --target {target} {more}"
    for name in ("llama-untied", "qwen2", "gemma2", "phi3", "opt", "gpt2", "gpt_neox", "bloom", "mixtral")
    for method, target, more in (("sparsegpt", "2:4", "--pack auto"), ("gptq", "4bit", f"--set group=0 {GPTQ}"))
}
OTHER = {
    "recipe file": "short --recipe recipe.yaml",
    "recipe file and flags": "short --recipe recipe.yaml --seed 1 --samples 5 --target 0.4",
    "own text": "short1 --method sparsegpt --target 2:4 --samples 2 --seq-len 16",
}
OWN_TEXT = tuple(OTHER)  # these say themselves which text they see

COMPRESSIONS = {**ZEROS, **BITS, **SHAPES, **CHAINS, **FAMILIES, **OTHER}

QUICK = (
    "magnitude 2:4",
    "sparsegpt 2:4",
    "wanda 0.6 owl",
    "gptq 4bit ends",
    "rtn 4bit options",
    "sparsegpt+gptq 2:4+4bit pack",
    "comp+gptq 0.25+4bit",
    "shortgpt 0.3",
    "family mixtral sparsegpt",
    "squeeze10 1.6bit uniform",
)
# In these, counts of zeros, matrices and bytes hold with any order of sums.
COUNTED = ("magnitude 2:4", "sparsegpt 2:4", "gptq 4bit ends", "rtn 4bit options", "family mixtral sparsegpt")


def flags_of(name: str) -> tuple[str, list[str]]:
    """Return the model of a compression and its flags."""
    model, *flags = COMPRESSIONS[name].split()
    calibration = [] if name in OWN_TEXT else (BRIEF if name.startswith("family") else CALIBRATED).split()
    return model, [*flags, *calibration, "--device", "cpu"]
