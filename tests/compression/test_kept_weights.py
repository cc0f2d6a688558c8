"""Families whose blocks hold more than plain matrices: hybrids of attention and state space, experts in stacks.

Each is compressed as a user would. The masks are recomputed with hooks of torch, on dense blocks after compressed ones.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import niwaki
from benchmarks.quality.model_types import tiny_config
from niwaki.compression.run_record import read_lines, read_run
from niwaki.config.events import silent
from niwaki.config.recipe import Calibration
from niwaki.data.texts import windows_for
from niwaki.model.anatomy import GATE, ROUTER, SHARED
from niwaki.model.decoder import Decoder, open_decoder
from niwaki.model.weight_uses import CONVOLVED, ELEMENTS
from support.families import build
from support.models import CPU, add_tokenizer, run, weights_of, write_texts

CALIBRATION: dict[str, Any] = {"samples": 4, "seq_len": 16}
MAMBA = {"mamba.conv1d.weight": CONVOLVED}
DELTA = {"linear_attn.conv1d.weight": CONVOLVED}
KEPT: dict[str, dict[str, str]] = {
    "qwen3_next": DELTA | {"mlp.gate.weight": ROUTER, "mlp.shared_expert_gate.weight": GATE},
    "qwen3_5_text": DELTA,
    "olmo_hybrid": DELTA,
    "kimi_linear": {
        "self_attn.conv1d.weight": CONVOLVED, "self_attn.forget_gate.A_log": ELEMENTS, "mlp.gate.weight": ROUTER
    },
    "lfm2": {"conv.conv.weight": CONVOLVED},
    "granitemoehybrid": MAMBA | {"block_sparse_moe.router.weight": ROUTER},
    "jamba": MAMBA | {"mamba.A_log": ELEMENTS, "feed_forward.router.weight": ROUTER},
    "bamba": MAMBA,
    "falcon_h1": MAMBA,
    "nemotron_h": {"mixer.conv1d.weight": CONVOLVED, "mixer.gate.weight": ROUTER},
    "zamba2": {"mamba.conv1d.weight": CONVOLVED, "mamba_decoder.mamba.conv1d.weight": CONVOLVED},
    "llama4_text": {"feed_forward.router.weight": ROUTER},
    "gpt_oss": {
        "mlp.router.weight": ROUTER, "mlp.experts.gate_up_proj_bias": ELEMENTS, "mlp.experts.down_proj_bias": ELEMENTS
    },
    "cohere": {"self_attn.q_norm.weight": ELEMENTS, "self_attn.k_norm.weight": ELEMENTS},
    "ernie4_5_moe": {"mlp.gate.weight": ROUTER, "mlp.gate.moe_statics.e_score_correction_bias": ELEMENTS},
}  # fmt: skip


@pytest.fixture(scope="module", params=KEPT)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {request.param}")
    config = tiny_config(request.param)
    config.vocab_size = 4096
    if request.param == "cohere":
        config.use_qk_norm = True
    folder = tmp_path_factory.mktemp("kept") / str(request.param)
    build(config).save_pretrained(folder)
    add_tokenizer(folder)
    write_texts(folder / "text.jsonl", 4)
    return folder


def opened(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_the_dense_walk_is_the_model(model: Path) -> None:
    decoder = open_decoder(model, CPU)
    kept = {name: reason for block in decoder.anatomy.blocks for name, reason in block.kept_dense.items()}
    assert {name: kept.get(name) for name in KEPT[model.name]} == KEPT[model.name]
    rest = {reason for name, reason in kept.items() if name not in KEPT[model.name]}
    assert rest == ({SHARED} if model.name == "zamba2" else set())
    ids_BT = torch.randint(1, 4096, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = opened(model)(input_ids=ids_BT, use_cache=False).logits
    x_BTD, calls = decoder.embed(ids_BT)
    for index, call in enumerate(calls):
        block = decoder.load(index)
        x_BTD = block.run(call, x_BTD)
        block.release()
    torch.testing.assert_close(decoder.logits(ids_BT, x_BTD), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_wanda_prunes_what_hooks_say_and_keeps_the_rest(model: Path, tmp_path: Path) -> None:
    texts = (str(model / "text.jsonl"),)
    events: list[str] = []

    def report(event: str, **fields: Any) -> None:
        events.extend([fields["message"]] if event == "warning" else [])

    out = tmp_path / "out"
    recipe = {"method": "wanda", "target": 0.5, "calibration": {"files": texts, **CALIBRATION}, "pack": "none"}
    niwaki.compress(model, out, report=report, device="cpu", **recipe)
    decoder = open_decoder(model, CPU)
    ids_ST = windows_for(Calibration(files=texts, **CALIBRATION), decoder, seed=0, report=silent).ids_ST
    checked = check_masks(decoder, opened(model), opened(out), ids_ST)
    linears = [linear for block in decoder.anatomy.blocks for linear in block.linears.values()]
    unhooked = {"mamba.dt_proj"} if model.name == "jamba" else set()  # its module reads the weight and is not called
    assert {linear.name for linear in linears if linear.expert is None} - checked == unhooked

    before, after = weights_of(model), weights_of(out)
    changed = set()
    for line in read_lines(out):
        linear = decoder.anatomy.blocks[line.block].linears[line.matrix]
        changed.add(decoder.anatomy.prefix(line.block) + linear.parameter)
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) != (decoder.names.parameters[name] in changed), name
    kept = read_run(out).kept_dense
    assert kept is not None and kept.weights.keys() >= KEPT[model.name].keys()
    assert kept.bytes == sum(weight.bytes for weight in kept.weights.values()) > 0
    assert sum("stay dense" in text and all(name in text for name in KEPT[model.name]) for text in events) == 1


def check_masks(decoder: Decoder, dense: Any, pruned: Any, ids_ST: Tensor) -> set[str]:
    """Assert that half of each row is zero where |weight| · ‖input‖ is small. Return the names of all linear layers."""
    checked: set[str] = set()
    new = pruned.state_dict()
    for index, anatomy in enumerate(decoder.anatomy.blocks):
        block = dense.get_submodule(f"{decoder.path}.{index}")
        inputs = hooked_inputs(dense, block, ids_ST)
        for name, linear in anatomy.linears.items():
            own = name if linear.expert is None else f"{linear.parameter}[{linear.expert}]"
            if own not in inputs:
                continue
            weight_OI = linear.view(block.get_parameter(linear.parameter)).double()
            found_OI = linear.view(new[decoder.anatomy.prefix(index) + linear.parameter])
            scores_OI = weight_OI.abs() * inputs[own].double().square().sum(0).sqrt()
            smallest = scores_OI.argsort(1)[:, : weight_OI.shape[1] // 2]
            assert torch.equal(
                found_OI == 0, torch.zeros_like(found_OI, dtype=torch.bool).scatter_(1, smallest, True)
            ), own
            checked.add(name)
        state = {name: tensor for name, tensor in new.items() if name.startswith(decoder.anatomy.prefix(index))}
        dense.load_state_dict(state, strict=False)
    return checked


def hooked_inputs(model: Any, block: nn.Module, ids_ST: Tensor) -> dict[str, Tensor]:
    """Return the inputs [N, I] of the linear layers of a block, and of the first matrices of its experts."""
    found: dict[str, list[Tensor]] = {}
    hooks = []
    for name, part in block.named_modules():
        if isinstance(part, nn.Linear):

            def keep(_: nn.Module, args: Any, name: str = name) -> None:
                found.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]))

            hooks.append(part.register_forward_pre_hook(keep))
        for leaf, stack in part.named_parameters(recurse=False):
            if stack.dim() < 3 or leaf not in ("gate_up_proj", "up_proj"):
                continue

            def route(part: nn.Module, args: Any, name: str = f"{name}.{leaf}") -> None:
                for expert, x_NI in enumerate(routed(args)):
                    if len(x_NI):
                        found.setdefault(f"{name}[{expert}]", []).append(x_NI)

            hooks.append(part.register_forward_pre_hook(route))
    with torch.no_grad():
        model(input_ids=ids_ST, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def routed(args: Any) -> list[Tensor]:
    """Return the tokens of each expert: by the chosen experts, or as Llama 4 sorts them."""
    x = args[0]
    if len(args) == 1:
        return list(x.view(4, -1, x.shape[-1]))
    x_NI = x.reshape(-1, x.shape[-1])
    return [x_NI[(args[1].reshape(len(x_NI), -1) == expert).any(1)] for expert in range(4)]


def test_gptq_loads_and_generates(model: Path, tmp_path: Path) -> None:
    texts = (str(model / "text.jsonl"),)
    calibration = {"files": texts, **CALIBRATION}
    out = tmp_path / "out"
    niwaki.compress(
        model, out, method="gptq", target="4bit", calibration=calibration, options={"group": 0}, device="cpu"
    )
    # With these tokens no router is at a tie that rounding decides.
    ids_BT = torch.randint(1, 4096, (1, 6), generator=torch.Generator().manual_seed(4))
    settings: Mapping[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    loaded, plain = niwaki.load(out, device="cpu"), opened(out)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids_BT).logits, plain(ids_BT).logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(loaded.generate(ids_BT, **settings), plain.generate(ids_BT, **settings))
        dense = niwaki.load(model, device="cpu").generate(ids_BT, **settings)
        assert torch.equal(dense, opened(model).generate(ids_BT, **settings))


@pytest.mark.parametrize("model", ["jamba"], indirect=True)
def test_plan_and_inspect_name_what_stays_dense(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = niwaki.plan(model, method="wanda", target=0.5)
    tensors, names = open_decoder(model, CPU).checkpoint.tensors, KEPT["jamba"]
    by_name = {name: sum(t.nbytes for disk, t in tensors.items() if disk.endswith(f".{name}")) for name in names}
    assert {name: weight["bytes"] for name, weight in planned["kept_dense"]["weights"].items()} == by_name
    assert planned["kept_dense"]["bytes"] == sum(by_name.values())
    code, printed, _ = run(capsys, "plan", model, "--method", "wanda", "--target", "0.5")
    assert code == 0 and "weights of the blocks that stay dense" in printed and "mamba.A_log" in printed

    niwaki.compress(model, tmp_path / "out", method="magnitude", target=0.5, device="cpu")
    record = read_run(tmp_path / "out").kept_dense
    assert record is not None and record.dump() == planned["kept_dense"]
    assert niwaki.inspect(tmp_path / "out")["kept_dense"] == planned["kept_dense"]
    code, printed, _ = run(capsys, "inspect", tmp_path / "out")
    assert code == 0 and f"dense: mamba.A_log, {ELEMENTS}, {by_name['mamba.A_log']:,} bytes in 2 blocks" in printed
    assert "mamba.A_log" in (tmp_path / "out" / "README.md").read_text()
