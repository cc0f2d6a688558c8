"""The option `--device` of scripts that run on a CPU and on a GPU, with defaults of each."""

import argparse
from collections.abc import Mapping
from typing import Any

import torch


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add `--device` to a parser."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")


def parse_for_device(parser: argparse.ArgumentParser, defaults: Mapping[str, Mapping[str, Any]]) -> argparse.Namespace:
    """Return the arguments, with the defaults of the chosen device. Exit if it is a GPU and there is none."""
    device = parser.parse_known_args()[0].device
    parser.set_defaults(**defaults[device])
    args = parser.parse_args()
    if device == "cuda":
        require_gpu(parser)
    return args


def require_gpu(parser: argparse.ArgumentParser) -> None:
    """Exit with the usage and an error if torch finds no GPU."""
    if not torch.cuda.is_available():
        parser.error("this needs a CUDA GPU, and torch finds none")
