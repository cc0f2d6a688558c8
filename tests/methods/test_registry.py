"""The table of methods needs no torch, and says what the modules declare."""

import subprocess
import sys

import pytest

from niwaki.config.targets import Bits
from niwaki.errors import InputError
from niwaki.methods.method import MethodKind, WalkMethod
from niwaki.methods.registry import METHODS, get_method, make_steps, method_infos, method_names


@pytest.mark.parametrize("name", METHODS)
def test_the_table_agrees_with_the_module(name: str) -> None:
    method, info = get_method(name), METHODS[name]
    assert method.kind is info.kind
    assert info.fractional_bits == (isinstance(method, WalkMethod) and method.min_bits is not None)


def test_names_are_checked_without_torch() -> None:
    script = """
import sys
from niwaki.methods.registry import method_infos
try:
    method_infos("sparsgpt")
except Exception as error:
    print(error, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "did you mean 'sparsegpt'" in done.stdout and done.stdout.rstrip().endswith("False")


def test_every_name_of_a_chain_is_checked() -> None:
    assert [info.name for info in method_infos("comp + gptq")] == ["comp", "gptq"]
    assert set(method_names(MethodKind.SHAPE)) == {"comp", "flap", "shortgpt", "two_ssp", "wanda_sp"}
    with pytest.raises(InputError, match="unknown method 'gtq'"):
        method_infos("comp+gtq")


def test_a_target_may_be_unknown_where_bits_follow_from_bytes() -> None:
    (step,) = make_steps("squeeze10", {}, None)
    assert step.quantizes and step.min_bits(64, 64) > 0 and step.group == 0


@pytest.mark.parametrize("method", [name for name, info in METHODS.items() if info.fractional_bits])
def test_a_method_fits_into_the_least_bits_that_it_names(method: str) -> None:
    """Go through shapes whose bytes, as bits a weight and back, may come out below themselves."""
    (step,) = make_steps(method, {}, None)
    for rows in range(32, 1600, 96):
        for columns in range(256, 1600, 192):
            target = Bits(step.min_bits(rows, columns))
            assert step.stored_bytes("m", rows, columns, target) == target.bytes_in(rows, columns)
