"""Counts add up; what is held at once is the larger, not the sum."""

from niwaki.methods.cost import Scope, Work, gram_factors, learning, masks, products, sweeps

SCOPE = Scope((((8, 4), (6, 4)), ((4, 8),)), windows=16, tokens=32)


def test_a_scope_counts_its_matrices_and_inputs() -> None:
    assert SCOPE.weights == 32 + 24 + 32 and SCOPE.inputs == [4, 8] and len(SCOPE.matrices) == 3


def test_work_adds_and_multiplies_but_memory_is_the_most() -> None:
    small, large = Work(passed=1, held_bytes=5, held_values=9), Work(passed=2, started=3, held_bytes=7)
    assert small + large == Work(passed=3, started=3, held_bytes=7, held_values=9)
    assert large * 3 == Work(passed=6, started=9, held_bytes=7)


def test_operations_are_those_of_the_formulas() -> None:
    assert gram_factors(SCOPE).solve_flops == 4 / 3 * (4**3 + 8**3)
    rows_by_squares = 8 * 16 + 6 * 16 + 4 * 64
    assert sweeps(SCOPE).product_flops == rows_by_squares
    assert products(SCOPE, 3).product_flops == 3 * 2 * rows_by_squares
    assert masks(SCOPE).selected == SCOPE.weights


def test_learning_sees_its_steps_and_the_held_out_eighth() -> None:
    work = learning(SCOPE, 10, 4, checks=2, copies=6)
    assert work.learned_tokens == 10 * 4 * 32 and work.forward_tokens == 3 * 2 * 32
    assert work.held_bytes == 6 * 4 * SCOPE.weights
    assert learning(SCOPE, 10, 99, checks=2, copies=6).learned_tokens == 10 * 14 * 32
