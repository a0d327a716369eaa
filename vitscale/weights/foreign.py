"""Files of other libraries: read whatever is there, write whole or not at all.

DIR/config.json + model.safetensors (+ preprocessor_config.json)   timm (has "architecture") or Hugging Face (has "model_type")
FILE.npz                                                           JAX, see jax.py; read without pickle, bf16 as 2 raw bytes
FILE.safetensors                                                   ours, see native.py
"""

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitscale.base.errors import EnvironmentFault, UsageError
from vitscale.base.files import canonical_json, fsync_path, publish, read_json, sha256_bytes, sha256_file, temporary_beside
from vitscale.weights.huggingface import from_huggingface
from vitscale.weights.jax import from_jax
from vitscale.weights.mapping import Foreign
from vitscale.weights.native import Weights, load_weights
from vitscale.weights.timm import from_timm

CONFIG, TENSORS, PIXELS = "config.json", "model.safetensors", "preprocessor_config.json"


def is_foreign(path: Path) -> bool:
    """Whether `load_any` would read the path as weights of another library."""
    return path.suffix == ".npz" or (path / TENSORS).is_file()


def load_any(path: Path) -> Weights:
    """Weights of ours or of another library. Raises EnvironmentFault for damaged files, UsageError for other models."""
    if path.suffix == ".npz":
        return _checked(path, lambda: from_jax(read_npz(path), origin=str(path)))
    if not path.is_dir():
        return load_weights(path)
    description = read_json(path / CONFIG)
    if not isinstance(description, dict) or not {"architecture", "model_type"} & description.keys():
        raise UsageError(f"{path / CONFIG}: expected a config.json of timm or Hugging Face, got neither; give a plain ViT")
    try:
        tensors = load_file(path / TENSORS)
    except (OSError, SafetensorError) as error:
        raise EnvironmentFault(f"{path / TENSORS} cannot be read as safetensors ({error}); restore it from a copy") from None
    if "architecture" in description:
        return _checked(path, lambda: from_timm(tensors, description, origin=str(path)))
    pixels = read_json(path / PIXELS) if (path / PIXELS).is_file() else None
    return _checked(path, lambda: from_huggingface(tensors, description, pixels, origin=str(path)))


def _checked(path: Path, convert: Callable[[], Weights]) -> Weights:
    """A description that makes no model is one sentence, not a traceback."""
    try:
        return convert()
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise UsageError(f"{path}: its description gives no model ({error}); give the weights of a plain ViT") from None


def identity_of_foreign(path: Path) -> str:
    """A sha256 over the file, or over the names and sha256 of the directory's weights and descriptions."""
    if path.is_file():
        return sha256_file(path)
    hashes = {name: sha256_file(path / name) for name in (CONFIG, TENSORS, PIXELS) if (path / name).is_file()}
    return sha256_bytes(canonical_json(hashes))


def save_directory(path: Path, foreign: Foreign, *, pixels: dict[str, Any] | None = None) -> None:
    """timm's or Hugging Face's directory; `path` must not exist."""
    if path.exists():
        raise UsageError(f"expected a new directory, got {path}, which exists; give another name")
    records = {CONFIG: foreign.description} | ({PIXELS: pixels} if pixels is not None else {})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in foreign.tensors.items()}
        save_file(tensors, temporary / TENSORS, metadata={"format": "pt"})
        for name, record in records.items():
            (temporary / name).write_bytes(canonical_json(record))
        for written in (*temporary.iterdir(), temporary):
            fsync_path(written)
        publish(temporary, path)
    except (OSError, SafetensorError) as error:
        raise EnvironmentFault(f"the weights cannot be written to {path} ({error}); give a place with room") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_npz(path: Path, arrays: dict[str, Tensor]) -> None:
    """An uncompressed npz; bf16 is written as 2 raw bytes, as numpy without its extension types reads it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_beside(path) as temporary:
            with zipfile.ZipFile(temporary, "w") as archive:
                for name, tensor in arrays.items():
                    # A fixed date, so that equal weights give equal files.
                    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                        np.lib.format.write_array(file, _to_numpy(tensor), allow_pickle=False)
            fsync_path(temporary)
            publish(temporary, path)
    except OSError as error:
        raise EnvironmentFault(f"the weights cannot be written to {path} ({error}); give a place with room") from None


def read_npz(path: Path) -> dict[str, Tensor]:
    """The arrays of an npz by name; an array of objects, which would need pickle, is refused."""
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = {}
            for name in archive.namelist():
                with archive.open(name) as file:
                    array = np.lib.format.read_array(file, allow_pickle=False)
                arrays[name.removesuffix(".npy")] = _to_tensor(array)
            return arrays
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise EnvironmentFault(f"{path} cannot be read as npz ({error}); restore it from a copy") from None


def _to_tensor(array: np.ndarray) -> Tensor:
    if array.dtype == np.dtype("V2"):
        return torch.from_numpy(np.ascontiguousarray(array).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape))


def _to_numpy(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu().contiguous()
    return tensor.view(torch.int16).numpy().view("V2") if tensor.dtype == torch.bfloat16 else tensor.numpy()
