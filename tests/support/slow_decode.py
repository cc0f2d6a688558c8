"""Decoders of packed matrices in plain NumPy and Python, written from the description of the formats alone."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from niwaki.formats.packed import PackedTensors

Matrix = NDArray[np.float64]


def slow_decode(record: PackedTensors) -> tuple[Matrix, Matrix]:
    """Return the matrix [O, I] of a record that its format allows, in float64, and the size of what it adds up."""
    tensors = {name: np.array(tensor.numpy()) for name, tensor in record.tensors.items()}
    rows, columns = record.description["shape"]
    if "parts" in record.description:
        return _codes(tensors, record.description["parts"], rows, columns)
    if "trellis" in record.description:
        matrix = _trellis(tensors, record.description["trellis"], rows, columns)
        return matrix, np.abs(matrix)
    stored = record.description["sparse"]
    decode = _tiles if stored["layout"] == "two_four_tiles" else _nonzeros
    matrix = decode(tensors, stored, rows, columns)
    return matrix, np.abs(matrix)


def _half(values: NDArray[Any]) -> Matrix:
    return values.view(np.float16).astype(np.float64)


def _bits(values: NDArray[Any]) -> NDArray[Any]:
    """Return bits as the last axis, the lowest first."""
    return np.unpackbits(values[..., None], axis=-1, bitorder="little")


def _codes(
    tensors: dict[str, NDArray[Any]], parts: list[dict[str, Any]], rows: int, columns: int
) -> tuple[Matrix, Matrix]:
    matrix, size = np.full((rows, columns), np.nan), np.full((rows, columns), np.nan)
    first = _bits(tensors["columns"]).reshape(-1)[:columns].astype(bool) if len(parts) > 1 else np.ones(columns, bool)
    for number, part in enumerate(parts):
        own = np.flatnonzero(first if number == 0 else ~first)
        bits = _bits(tensors[f"planes_{number}"])  # [T, K, B, 32, 8]
        scale = _half(tensors[f"scale_{number}"])
        zero = tensors.get(f"zero_{number}")
        for row in range(rows):
            code = sum(
                bits[row // 32, k, :, row % 32].reshape(-1)[: len(own)].astype(int) << k for k in range(part["bits"])
            )
            group = np.arange(len(own)) // part["group"]
            if part["grid"] == "free":
                offset = _half(tensors[f"offset_{number}"])[group, row]
            else:
                middle = 2.0 ** (part["bits"] - 1) - (0.5 if part["grid"] == "midrise" else 0)
                if zero is not None:
                    at = group * rows + row
                    middle = sum(((zero[k, at // 8] >> (at % 8)) & 1).astype(int) << k for k in range(part["bits"]))
                offset = -middle * scale[group, row]
            matrix[row, own] = code * scale[group, row] + offset
            size[row, own] = np.abs(code * scale[group, row]) + np.abs(offset)
    return matrix, size


def _trellis(tensors: dict[str, NDArray[Any]], parts: list[dict[str, Any]], rows: int, columns: int) -> Matrix:
    matrix = np.full((rows, columns), np.nan)
    first = _bits(tensors["columns"]).reshape(-1)[:columns].astype(bool) if len(parts) > 1 else np.ones(columns, bool)
    for number, part in enumerate(parts):
        levels, scale = tensors[f"levels_{number}"].view(np.int8), _half(tensors[f"scale_{number}"])[0]
        for own, column in enumerate(np.flatnonzero(first if number == 0 else ~first)):
            for row in range(rows):
                ring = int.from_bytes(tensors[f"rings_{number}"][row // 32, own].tobytes(), "little")
                begin, length = part["bits"] * (row % 32), 32 * part["bits"]
                state = ((ring >> begin) | (ring << (length - begin))) & 255
                matrix[row, column] = float(levels[state]) * scale[row]
    return matrix


def _value(values: NDArray[Any], kind: str, at: int) -> float:
    if kind == "int4":
        code = int(values[at // 2]) >> (4 * (at % 2)) & 15
        return float(code - 16 if code > 7 else code)
    if kind == "int8":
        return float(values[at : at + 1].view(np.int8)[0])
    if kind == "bfloat16":
        word = int(values[2 * at]) << 16 | int(values[2 * at + 1]) << 24
        return float(np.array([word], np.uint32).view(np.float32)[0])
    dtype = np.float16 if kind == "float16" else np.float32
    size = np.dtype(dtype).itemsize
    return float(values[size * at : size * at + size].view(dtype)[0])


def _nonzeros(tensors: dict[str, NDArray[Any]], stored: dict[str, Any], rows: int, columns: int) -> Matrix:
    matrix, places = np.zeros((rows, columns)), tensors["places"]
    at = 0
    for row in range(rows):
        found = []
        for number, byte in enumerate(places[row].tolist()):
            if stored["layout"] == "bitmap":
                found += [8 * number + bit for bit in range(8) if byte >> bit & 1]
            else:
                found += [8 * number + 4 * (j // 2) + (byte >> (2 * j) & 3) for j in range(4)]
        for column in found:
            value = _value(tensors["values"], stored["values"], at)
            at += 1
            if column < columns:
                scale = _half(tensors["scale"])[row, column // stored["group"]] if "scale" in tensors else 1.0
                matrix[row, column] = value * scale
    return matrix


def _tiles(tensors: dict[str, NDArray[Any]], stored: dict[str, Any], rows: int, columns: int) -> Matrix:
    matrix, scale = np.zeros((rows, columns)), _half(tensors["scale"])
    places, values = tensors["places"], tensors["values"]
    for row in range(rows):
        tile, half, lane = row // 32, row % 32 // 16, 2 * (row % 16)
        for four in range(columns // 4):
            for j in range(2):
                code = int(values[tile, four, lane + j]) >> (4 * half) & 15
                index = int(places[tile, four // 2, lane + j]) >> (4 * (four % 2) + 2 * half) & 3
                column = 4 * four + index
                matrix[row, column] = (code - 16 if code > 7 else code) * scale[column // stored["group"], row]
    return matrix
