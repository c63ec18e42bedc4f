"""A Hugging Face checkpoint folder: config.json and safetensors files, read without torch."""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from freeio_jax.hf import quantized
from freeio_jax.hf.options import text_config
from freeio_jax.hf.safetensors import SafetensorsFile

#: The file that names the file of each tensor, where there are several.
INDEX = "model.safetensors.index.json"
_ONE_FILE = "model.safetensors"
#: Values of config.json's ``quantization_config.quant_method`` that this reader understands.
_QUANTIZATIONS = ("fp8", "mxfp4")
_FLOATS = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


class Checkpoint:
    """A folder with ``config.json`` and safetensors files, one or several with an index.

    Names are those of the files. Where the files hold a quantized weight, its name stands for the
    weight itself, and the names of its parts are left out: ``...gate_proj.weight`` and
    ``...gate_proj.weight_scale_inv`` are one fp8 weight, ``...gate_up_proj_blocks`` and
    ``...gate_up_proj_scales`` the mxfp4 weight ``...gate_up_proj``.

    Attributes:
      folder: the path.
      config: the contents of config.json, a dict.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"hf.open: there is no folder {self.folder}.")
        self.config: dict[str, Any] = _read_json(self.folder / "config.json")
        method = (self.config.get("quantization_config") or {}).get("quant_method")
        if method is not None and method not in _QUANTIZATIONS:
            raise ValueError(
                f"hf.open: {self.folder} is quantized by quant_method={method!r}, but this reader "
                f"knows {', '.join(_QUANTIZATIONS)} and weights that are not quantized. Use a "
                "checkpoint of one of these kinds."
            )
        self._files: dict[str, SafetensorsFile] = {}
        self._file_of = self._find_tensors()
        self._names = tuple(filter(None, map(self._logical_name, self._file_of)))
        self._known = frozenset(self._names)

    def names(self) -> tuple[str, ...]:
        """The names of all weights."""
        return self._names

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight; reads headers alone."""
        self._check_known(name)
        if name in self._file_of:
            return self._file(name).shape(name)
        *experts, rows, groups, size = self._stored_shape(name + quantized.MXFP4_BLOCKS)
        return (*experts, groups * size * 2, rows)

    def stored_dtype(self, name: str) -> np.dtype:
        """The element type in the file; uint8 for mxfp4."""
        self._check_known(name)
        stored = name if name in self._file_of else name + quantized.MXFP4_BLOCKS
        return self._file(stored).dtype(stored)

    def file_of(self, name: str) -> str:
        """The name of the file that holds a weight."""
        self._check_known(name)
        return self._file_of.get(name) or self._file_of[name + quantized.MXFP4_BLOCKS]

    def check_complete(self, name: str) -> None:
        """Raises ValueError where the file ends before the weight does; reads headers alone."""
        self._check_known(name)
        parts = (name, name + quantized.FP8_SCALES)
        if name not in self._file_of:
            parts = (name + quantized.MXFP4_BLOCKS, name + quantized.MXFP4_SCALES)
        for part in parts:
            if part in self._file_of:
                self._file(part).check_complete(part)

    def is_quantized(self, name: str) -> bool:
        """Whether :meth:`tensor` computes the weight from a quantized one."""
        self._check_known(name)
        return name not in self._file_of or name + quantized.FP8_SCALES in self._file_of

    def tensor(self, name: str, rows: slice | None = None, dtype: Any = None) -> np.ndarray:
        """A weight.

        Args:
          name: one of :meth:`names`.
          rows: of the weight's first dimension, contiguous; only these are read. None: all.
          dtype: of a quantized weight's values; None: the ``dtype`` of config.json, else bfloat16.
            Other weights come as they are stored.

        Returns:
          A numpy array. bfloat16 and float8 are types of ml_dtypes. What is not quantized is a view
          of the file, which must not be written.

        Raises:
          ValueError: there is no such weight, its file is truncated, or the shapes of its parts do
            not fit together.
          FileNotFoundError: the index names a file that is not there.
        """
        self._check_known(name)
        if not self.is_quantized(name):
            return self._file(name).tensor(name, rows)
        dtype = np.dtype(self.default_dtype if dtype is None else dtype)
        if name in self._file_of:
            return self._fp8(name, rows, dtype)
        return self._mxfp4(name, rows, dtype)

    def _find_tensors(self) -> dict[str, str]:
        """The file of each stored tensor."""
        if (self.folder / INDEX).is_file():
            index = _read_json(self.folder / INDEX)
            if not isinstance(index.get("weight_map"), dict):
                raise ValueError(f"hf.open: {self.folder / INDEX} has no 'weight_map'.")
            missing = sorted(
                f for f in set(index["weight_map"].values()) if not (self.folder / f).is_file()
            )
            if missing:
                raise FileNotFoundError(
                    f"hf.open: {self.folder / INDEX} names {len(missing)} files that are not "
                    f"there, the first one {missing[0]}. Download them."
                )
            return index["weight_map"]
        if (self.folder / _ONE_FILE).is_file():
            files = [_ONE_FILE]
        else:
            files = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(
                f"hf.open: {self.folder} has no safetensors files: neither {INDEX} nor "
                f"{_ONE_FILE}. Weights of another format (*.bin, *.gguf) must be converted first."
            )
        file_of = {}
        for file in files:
            self._files[file] = SafetensorsFile(self.folder / file)
            for name in self._files[file].names():
                if name in file_of:
                    raise ValueError(
                        f"hf.open: the tensor {name!r} is in {file_of[name]} and in {file} of "
                        f"{self.folder}. Remove one of the files, or add an index, {INDEX}."
                    )
                file_of[name] = file
        return file_of

    def _logical_name(self, name: str) -> str | None:
        """The weight whose stored tensor this is; None where another tensor stands for it."""
        fp8, blocks, scales = (
            quantized.FP8_SCALES,
            quantized.MXFP4_BLOCKS,
            quantized.MXFP4_SCALES,
        )
        if name.endswith(fp8) and name.removesuffix(fp8) in self._file_of:
            return None
        if name.endswith(scales) and name.removesuffix(scales) + blocks in self._file_of:
            return None
        if name.endswith(blocks) and name.removesuffix(blocks) + scales in self._file_of:
            return name.removesuffix(blocks)
        return name

    def _check_known(self, name):
        if name not in self._known:
            close = difflib.get_close_matches(name, self._names, n=3)
            raise ValueError(
                f"hf: {self.folder} has no tensor {name!r}"
                + (f". The closest names are {close}." if close else f", of {len(self._names)}.")
            )

    def _file(self, name: str) -> SafetensorsFile:
        file = self._file_of[name]
        if file not in self._files:
            self._files[file] = SafetensorsFile(self.folder / file)
        if name not in self._files[file]:
            raise ValueError(
                f"hf: by {INDEX} the tensor {name!r} is in {file}, but that file of {self.folder} "
                "does not have it. Download index and files again."
            )
        return self._files[file]

    def _stored_shape(self, name):
        return self._file(name).shape(name)

    @property
    def default_dtype(self) -> Any:
        """The ``dtype`` of config.json, else bfloat16."""
        for config in (self.config, text_config(self.config)):
            dtype = config.get("dtype") or config.get("torch_dtype")
            if dtype in _FLOATS:
                return _FLOATS[dtype]
        return ml_dtypes.bfloat16

    def _fp8(self, name, rows, dtype):
        shape, scale_name = self.shape(name), name + quantized.FP8_SCALES
        scales = self._file(scale_name).tensor(scale_name)
        if scales.ndim < 2:  # one scale for all
            scales = scales.reshape((1,) * len(shape))
        block = self._block(name, shape, scales.shape)
        if len(shape) > 2:
            scales = scales if rows is None or scales.shape[0] == 1 else scales[rows]
            first_row = 0
        else:
            first_row = 0 if rows is None else rows.indices(shape[0])[0]
        weight = self._file(name).tensor(name, rows)
        return quantized.fp8_weight(weight, scales, block, first_row, dtype)

    def _block(self, name, shape, grid):
        """Rows and columns of a block of an fp8 weight, whose scales have the shape ``grid``."""
        settings = self.config.get("quantization_config") or {}
        block = settings.get("weight_block_size") or (shape[-2], shape[-1])
        matrix = shape[-2:]
        if all(-(-n // b) == g for n, b, g in zip(matrix, block, grid[-2:], strict=True)):
            return tuple(block)
        if all(n % g == 0 for n, g in zip(matrix, grid[-2:], strict=True)):
            return tuple(n // g for n, g in zip(matrix, grid[-2:], strict=True))
        expected = [-(-n // b) for n, b in zip(matrix, block, strict=True)]
        raise ValueError(
            f"hf: the fp8 weight {name!r} of {self.file_of(name)} has shape {list(shape)}, so its "
            f"scales must have {expected} blocks of {list(block)}, but their shape is "
            f"{list(grid)}."
        )

    def _mxfp4(self, name, rows, dtype):
        blocks, scales = (
            self._file(part).tensor(part, rows)
            for part in (name + quantized.MXFP4_BLOCKS, name + quantized.MXFP4_SCALES)
        )
        if blocks.shape[:-1] != scales.shape:
            raise ValueError(
                f"hf: the mxfp4 weight {name!r} of {self.file_of(name)} has blocks of shape "
                f"{list(blocks.shape)}, so its scales must be {list(blocks.shape[:-1])}, but they "
                f"are {list(scales.shape)}."
            )
        return quantized.mxfp4_weight(blocks, scales, dtype)


def open(folder: str | os.PathLike) -> Checkpoint:
    """Opens a checkpoint folder: reads config.json, the index and headers, but no weights.

    Raises:
      FileNotFoundError: the folder, config.json or a safetensors file is missing.
      ValueError: a file is damaged, or the weights are quantized in a way that is not known.
    """
    return Checkpoint(folder)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"hf.open: there is no {path}. Give the folder of a Hugging Face checkpoint, which has "
            "config.json and *.safetensors."
        )
    try:
        contents = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"hf.open: {path} is not JSON: {error}.") from None
    if not isinstance(contents, dict):
        raise ValueError(f"hf.open: {path} must hold a JSON object.")
    return contents
