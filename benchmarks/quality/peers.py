"""Compress with a peer: AutoRound, GPTQModel, HQQ or llm-compressor, and keep what its result decodes to.

    PYTHONPATH=FOLDER/NAME python -m benchmarks.quality.peers MODEL WINDOWS OUT --case '{"peer": NAME, ...}'

real_model.py runs this script, one process per case, because peers patch transformers when they are imported.
WINDOWS is a safetensors file with the calibration tokens of niwaki's rows. OUT is MODEL in float32 with the decoded
matrices of the blocks. The last line printed is JSON: seconds, seconds of processor time, bits, share of zeros.

Clocks begin after the import of the peer and stop when it has all matrices. They contain the loading of the model, but
no export and no decoding. Bits are those of the codes and of their 16-bit scales. Zero points count where a grid has
them; orders of columns never do. That favors the peers. For HQQ they are the bytes of its own tensors.

Every option that a case does not set has the peer's default, with two exceptions. The model is loaded in float32 as for
niwaki. GPTQModel keeps its layers in memory.
"""

import argparse
import importlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

Weights = dict[str, Tensor]  # decoded matrices by the names of their modules
Result = tuple[Callable[[], Weights], float]  # what decodes the result, and its bits per weight
HEAD = "lm_head"


def load(model: str, device: str) -> Any:
    """Return the model in float32."""
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device)


def matrices(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of the blocks by name."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: module for name, module in found.items() if not name.endswith(HEAD)}


def dense_weights(model: nn.Module) -> Weights:
    """Return the weights of a model whose linear layers hold decoded numbers."""
    return {name: module.weight.detach() for name, module in matrices(model).items()}


def samples(ids_ST: Tensor) -> list[dict[str, Tensor]]:
    """Return the windows as the peers want them."""
    return [{"input_ids": ids_T, "attention_mask": torch.ones_like(ids_T)} for ids_T in ids_ST]


def grid_bits(bits: int, group: int, sym: bool) -> float:
    """Return the bits per weight of codes with 16-bit scales, and zero points where the grid has them."""
    return bits + (16 + (0 if sym else bits)) / group


def auto_round(model: str, ids_ST: Tensor, device: str, case: dict[str, Any]) -> Result:
    """Learn rounding and ranges block by block with AutoRound."""
    from auto_round import AutoRound

    bits, group, sym = case["bits"], case["group"], case["sym"]
    batch = case.get("batch", 8)  # its default
    tuner = AutoRound(
        load(model, device), AutoTokenizer.from_pretrained(model), bits=bits, group_size=group, sym=sym,
        dataset=DataLoader(samples(ids_ST), batch_size=batch), nsamples=len(ids_ST), seqlen=ids_ST.shape[1],
        batch_size=batch, device_map=device, seed=case["seed"], **case.get("options", {}),
    )  # fmt: skip
    tuned, _ = tuner.quantize()
    return lambda: dense_weights(tuned), grid_bits(bits, group, sym)


def gptqmodel(model: str, ids_ST: Tensor, device: str, case: dict[str, Any]) -> Result:
    """Run GPTQModel and decode its packed layers with its own code."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # on a machine of one core its default is refused
    bits, group, sym = case["bits"], case["group"], case["sym"]
    config = QuantizeConfig(bits=bits, group_size=group, sym=sym, offload_to_disk=False, **case.get("options", {}))
    loaded = GPTQModel.load(model, config, device=device, dtype=torch.float32)
    loaded.quantize([{key: ids_T[None] for key, ids_T in sample.items()} for sample in samples(ids_ST)], batch_size=1)

    def decode() -> Weights:
        """Return the weights that its loader decodes: packed layers in memory still have the zero points of files."""
        with tempfile.TemporaryDirectory() as folder:
            loaded.save(folder)
            packed = GPTQModel.load(folder, device=device, backend=BACKEND.GPTQ_TORCH).model.named_modules()
            return {name: m.dequantize_weight().T.detach() for name, m in packed if hasattr(m, "dequantize_weight")}

    return decode, grid_bits(bits, group, sym)


def hqq(model: str, ids_ST: Tensor, device: str, case: dict[str, Any]) -> Result:
    """Round with HQQ, which reads no data, and count the bytes of its tensors."""
    from hqq.core.quantize import BaseQuantizeConfig, Quantizer

    options = BaseQuantizeConfig(nbits=case["bits"], group_size=case["group"], **case.get("options", {}))
    nbytes, weights = 0, 0
    found: dict[str, Any] = {}
    for name, weight_OI in dense_weights(load(model, device)).items():
        codes, meta = Quantizer.quantize(weight_OI, device=device, **options["weight_quant_params"])
        for key in ("scale", "zero"):
            meta[key] = meta[key].half()
            nbytes += meta[key].nbytes
            meta[key] = meta[key].float()
        meta["compute_dtype"] = torch.float32
        nbytes, weights = nbytes + codes.nbytes, weights + weight_OI.numel()
        found[name] = codes, meta
    return lambda: {name: Quantizer.dequantize(*packed) for name, packed in found.items()}, 8 * nbytes / weights


def llmcompressor(model: str, ids_ST: Tensor, device: str, case: dict[str, Any]) -> Result:
    """Run one modifier of llm-compressor. Its weights are decoded already."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    pruners = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}
    options = {"ignore": [f"re:.*{HEAD}"], **case.get("options", {})}
    if case["method"] in pruners:
        modifier, size = pruners[case["method"]](targets=["Linear"], **options), 16.0
    else:
        bits, group, sym = case["bits"], case["group"], case["sym"]
        grid = {"num_bits": bits, "type": "int", "symmetric": sym, "strategy": "group", "group_size": group}
        modifier = GPTQModifier(config_groups={"all": {"targets": ["Linear"], "weights": grid}}, **options)
        size = grid_bits(bits, group, sym)
    done = oneshot(
        model=load(model, device), dataset=DataLoader(samples(ids_ST), batch_size=1), recipe=[modifier],
        num_calibration_samples=len(ids_ST), max_seq_length=ids_ST.shape[1],
    )  # fmt: skip
    return lambda: dense_weights(done), size


PEERS: dict[str, Callable[..., Result]] = {
    "auto_round": auto_round, "gptqmodel": gptqmodel, "hqq": hqq, "llmcompressor": llmcompressor,
}  # fmt: skip


def write(source: str, weights: Weights, out: Path) -> float:
    """Write the model in float32 with the decoded weights, and return their share of zeros."""
    model = load(source, "cpu")
    layers = matrices(model)
    missing = layers.keys() - weights.keys()
    assert not missing, f"expected a decoded matrix for every linear layer of the blocks, got none for {missing}"
    zeros = total = 0
    with torch.no_grad():
        for name, module in layers.items():
            module.weight.copy_(weights[name])
            zeros, total = zeros + int((module.weight == 0).sum()), total + module.weight.numel()
    model.save_pretrained(out)
    for path in Path(source).glob("*token*"):
        shutil.copy(path, out)
    return zeros / total


def main() -> None:
    """Compress with one peer and print what it cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("windows", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--case", type=json.loads, required=True)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    ids_ST = load_file(args.windows)["ids"]
    importlib.import_module(args.case["peer"])
    begun, processor = time.perf_counter(), time.process_time()
    decode, bits = PEERS[args.case["peer"]](args.model, ids_ST, args.device, args.case)
    if args.device != "cpu":
        torch.cuda.synchronize()
    seconds = {"compress_s": time.perf_counter() - begun, "processor_s": time.process_time() - processor}
    zeros = write(args.model, decode(), args.out)
    print(json.dumps({"seconds": seconds, "bits": bits, "zeros_frac": zeros, "version": version(args.case["peer"])}))


if __name__ == "__main__":
    main()
