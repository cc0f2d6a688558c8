"""The trellis kernels of the GPU, interpreted by Triton: paths of the reference, panels, products and decoded rows."""

import torch

from niwaki.formats.packed import PackedTensors
from niwaki.formats.trellis import assemble_trellis
from niwaki.kernels import trellis
from niwaki.kernels.trellis import encode_reference, round_columns_reference
from niwaki.kernels.types import Codebook, Start, TrellisLaunch
from niwaki.runtime import trellis_linear
from niwaki.runtime.trellis_linear import TrellisLinear
from support.trellis_records import kernel_parts, trellis_matrix
from support.triton_interpreter import interpreted


def test_the_search_is_the_reference() -> None:
    interpreted("search", __name__)


def search() -> None:
    """Search with rows after the last whole ring, in several launches."""
    from niwaki.kernels.triton import trellis

    trellis.MAX_RINGS = 4
    generator = torch.Generator().manual_seed(0)
    level, weight = torch.randn(256, generator=generator), torch.rand(50, generator=generator) + 0.1
    for bits in (1, 2, 3, 4):
        wanted = torch.randn(50, 3, generator=generator)
        assert torch.equal(
            trellis.encode_triton(wanted, weight, level, bits), encode_reference(wanted, weight, level, bits)
        )


def test_a_panel_is_rounded_as_by_the_reference() -> None:
    interpreted("panel", __name__)


def panel() -> None:
    """Sweep and descend over columns of two widths and of one, with rows after the last whole ring."""
    from niwaki.kernels.triton import trellis

    generator = torch.Generator().manual_seed(0)
    rows, columns = 40, 5
    wanted, inputs = torch.randn(rows, columns, generator=generator), torch.randn(9, columns, generator=generator)
    coupling = inputs.T @ inputs / 9 + 0.1 * torch.eye(columns)
    for bits in ((2, 3), (1, 2), (4,)):
        level, scale = torch.randn(len(bits), 256, generator=generator), torch.rand(rows, len(bits)) + 0.5
        part = torch.tensor([0, len(bits) - 1, 0, 0, len(bits) - 1])
        book = Codebook(bits, level, scale)
        found = trellis.round_triton(wanted, coupling, book, part, None)
        states, changes = round_columns_reference(wanted, coupling, book, part)
        assert torch.equal(found[0], states)
        torch.testing.assert_close(found[1], changes)
        value = level.view(-1)[states[:rows].int() + part.int() * 256] * scale[:, part]
        start = Start(value, states)
        pull = (wanted - value) @ coupling
        found = trellis.round_triton(pull, coupling, book, part, start)
        again, changes = round_columns_reference(pull, coupling, book, part, start)
        assert torch.equal(found[0], again) and not torch.equal(again, states)
        torch.testing.assert_close(found[1], changes)
        missing = wanted - value - changes
        assert float(((missing @ coupling) * missing).sum()) < float(
            (((wanted - value) @ coupling) * (wanted - value)).sum()
        )


def test_products_and_decoded_rows() -> None:
    interpreted("products", __name__)


def products() -> None:
    """Multiply at every width, with one part and two, in one step and in several. Decode a later tile.

    In float16, because the interpreter multiplies the bits of bfloat16 as whole numbers.
    """
    from niwaki.kernels.triton.trellis_product import decode_triton, default_launch, product_triton

    launches = TrellisLaunch(False, 2, 2), TrellisLaunch(False, 1, 4), TrellisLaunch(True, 2, 2)
    assert default_launch(16, torch.float16, 1).cores and not default_launch(16, torch.float32, 1).cores
    for rows, columns, bits, others in ((50, 37, 2, None), (64, 130, 2, 3), (33, 70, 1, None), (40, 90, 3, 4)):
        parts = trellis_matrix(rows, columns, bits, others)
        weight, own = assemble_trellis(parts), kernel_parts(parts)
        generator = torch.Generator().manual_seed(1)
        x, bias = torch.randn(5, columns, generator=generator).half(), torch.randn(rows, generator=generator)
        for launch, tokens in zip(launches, (1, 5, 3), strict=True):
            out, exact = torch.full((tokens, rows), float("nan")), x[:tokens].double() @ weight.double().T + bias
            product_triton(x[:tokens], own, bias, out, launch)
            assert float((out - exact).norm()) <= 1e-6 * float(exact.norm())
        out = torch.full((rows - 32, columns), float("nan"))
        decode_triton(own, rows, 32, out)
        assert torch.equal(out, weight[32:, torch.cat([part.columns_C for part in parts])])


def test_layers() -> None:
    interpreted("layers", __name__)


def layers() -> None:
    """Multiply a few tokens and many, which take the matrix decoded in several steps, with one part and two."""
    trellis_linear.DECODED_BYTES = 1
    for others in (None, 3):
        parts = trellis_matrix(50, 70, 2, others)
        record = PackedTensors.of_trellis(parts, (50, 70))
        layer = TrellisLinear(50, 70, record.description, True)
        generator = torch.Generator().manual_seed(1)
        x, bias = torch.randn(trellis.MAX_GPU_TOKENS + 1, 70, generator=generator), torch.randn(50, generator=generator)
        layer.load_state_dict({**record.tensors, "bias": bias})
        for tokens in (1, 3, len(x)):
            expected = x[:tokens].double() @ assemble_trellis(parts).double().T + bias
            assert float((layer.gpu_product(x[:tokens]) - expected).norm()) <= 1e-6 * float(expected.norm())
