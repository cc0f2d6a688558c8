"""Latent weights and their levels: torch against plain formulas in float64, and Triton, interpreted, against torch."""

import torch

from niwaki.kernels.latent import codes_of, gradients_of_reference, weights_of_reference
from support.kernel_cases import latent_case
from support.triton_interpreter import interpreted

CASES = [(1, (0, 1), [1.0]), (3, (0, 40, 200), [15.0, 1.0]), (5, (0, 8, 16, 21), [3.0, 3.0, 255.0])]


def test_every_column_takes_the_nearest_of_its_levels() -> None:
    for rows, bounds, tops in CASES:
        latent, levels, gradient = latent_case(rows, bounds, tops)
        weight = weights_of_reference(latent, levels, torch.float32)
        by_latent, by_code, by_one = gradients_of_reference(latent, levels, gradient)
        for group, top in enumerate(tops):
            grid = torch.arange(int(top) + 1).double()[:, None] * levels.scale_OG[:, group].double()
            grid += levels.offset_OG[:, group].double()
            code_sum, one_sum = torch.zeros(rows).double(), torch.zeros(rows).double()
            for column in range(bounds[group], bounds[group + 1]):
                place = int(levels.groups.order_I[column])
                best = (grid - latent[:, column].double()).abs().argmin(0)
                assert torch.equal(codes_of(latent, levels)[:, column].long(), best)
                torch.testing.assert_close(weight[:, place].double(), grid[best, torch.arange(rows)])
                assert torch.equal(by_latent[:, column], gradient[:, place])
                code_sum += gradient[:, place].double() * best
                one_sum += gradient[:, place].double()
            torch.testing.assert_close(by_code[:, group].double(), code_sum, rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(by_one[:, group].double(), one_sum, rtol=1e-5, atol=1e-5)


def test_the_triton_kernels_do_the_same() -> None:
    interpreted("parity", __name__)


def parity() -> None:
    from niwaki.kernels.triton.latent import gradients_of_triton, weights_of_triton

    for rows, bounds, tops in [*CASES, (2, (0, 1500, 2600), [3.0, 1.0])]:
        latent, levels, gradient = latent_case(rows, bounds, tops)
        expected = weights_of_reference(latent, levels, torch.float32)
        torch.testing.assert_close(weights_of_triton(latent, levels, torch.float32), expected)
        half = weights_of_triton(latent, levels, torch.float16)
        assert torch.equal(half, weights_of_triton(latent, levels, torch.float32).half())
        for found, wanted in zip(
            gradients_of_triton(latent, levels, gradient), gradients_of_reference(latent, levels, gradient), strict=True
        ):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
