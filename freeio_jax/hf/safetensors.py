"""Files of the safetensors format: tensors are read as views of a memory map, and written."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

#: The format's names of element types (https://huggingface.co/docs/safetensors).
DTYPES = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "U16": np.uint16,
        "I16": np.int16,
        "U32": np.uint32,
        "I32": np.int32,
        "U64": np.uint64,
        "I64": np.int64,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F32": np.float32,
        "F64": np.float64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    }.items()
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

#: Bytes before the header: its length, little-endian.
_LENGTH_BYTES = 8


class SafetensorsFile:
    """One file. Opening it reads the header alone.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is truncated, or its header is not that of a safetensors file.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"safetensors: there is no file {self.path}.")
        self._size = self.path.stat().st_size
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            self._start = _LENGTH_BYTES + length
            if self._size < self._start:
                raise ValueError(
                    f"safetensors: {self.path} has {self._size} bytes, but its header alone would "
                    f"end at byte {self._start}. The file is truncated, or is no safetensors file."
                )
            text = file.read(length)
        try:
            self._entries = json.loads(text)
            self._entries.pop("__metadata__", None)
        except (ValueError, AttributeError) as error:
            raise ValueError(
                f"safetensors: the header of {self.path} is not JSON ({error}). The file is "
                "damaged, or is no safetensors file."
            ) from None
        self._map = None

    def names(self) -> tuple[str, ...]:
        """The names of all tensors, in the header's order."""
        return tuple(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor; reads nothing."""
        return tuple(self._entries[name]["shape"])

    def dtype(self, name: str) -> np.dtype:
        """The element type of a tensor; reads nothing."""
        dtype = self._entries[name]["dtype"]
        if dtype not in DTYPES:
            raise ValueError(
                f"safetensors: the tensor {name!r} of {self.path} has the element type {dtype}, "
                f"but this reader knows {', '.join(DTYPES)}."
            )
        return DTYPES[dtype]

    def tensor(self, name: str, rows: slice | None = None) -> np.ndarray:
        """A tensor, or ``rows`` of its first dimension: a view of the file, not to be written.

        The operating system reads the bytes when they are used.

        Raises:
          ValueError: the file ends before the tensor does, or the header contradicts itself.
        """
        self.check_complete(name)
        if self._map is None:
            self._map = np.memmap(self.path, np.uint8, mode="r")
        begin, end = self._entries[name]["data_offsets"]
        data = self._map[self._start + begin : self._start + end]
        array = np.asarray(data).view(self.dtype(name)).reshape(self.shape(name))
        return array if rows is None else array[rows]

    def check_complete(self, name: str) -> None:
        """Raises ValueError where the file ends before the tensor does; reads nothing."""
        shape, dtype = self.shape(name), self.dtype(name)
        begin, end = self._entries[name]["data_offsets"]
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(
                f"safetensors: the tensor {name!r} of {self.path} has {end - begin} bytes, but "
                f"{dtype} {list(shape)} needs {math.prod(shape) * dtype.itemsize}."
            )
        if self._start + end > self._size:
            raise ValueError(
                f"safetensors: the tensor {name!r}, {dtype} {list(shape)}, ends at byte "
                f"{self._start + end} of {self.path}, but the file has {self._size} bytes. It is "
                "truncated: download it again."
            )


def write(
    path: str | os.PathLike,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a file with these tensors. ``path`` is replaced when all is written."""
    path = Path(path)
    header, end = {"__metadata__": dict(metadata or {"format": "pt"})}, 0
    for name, array in tensors.items():
        begin, end = end, end + array.nbytes
        if array.dtype not in _NAMES:
            raise ValueError(
                f"safetensors: the tensor {name!r} has dtype {array.dtype}, which the format lacks."
            )
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    # Under another name first: a reader of the old file keeps its memory map.
    unfinished = path.with_name(f"{path.name}.unfinished")
    with unfinished.open("wb") as file:
        file.write(len(text).to_bytes(_LENGTH_BYTES, "little"))
        file.write(text)
        for chunk in _bytes_of(tensors.values()):
            file.write(chunk)
    unfinished.replace(path)


def _bytes_of(arrays: Iterable[np.ndarray]):
    for array in arrays:
        yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
