"""Weights as one .safetensors file that says which model they belong to.

PATH.safetensors
  tensors    every parameter under its name in the module, in the dtype it was given
  metadata   one key, "vitscale": JSON with
               schema_version   1
               model            the section `model` of the configuration
               meta             texts: class names, source run, step, ...
               xxh3             64-bit hashes, since the format itself has no checksum: of the bytes of each tensor by
                                its name, and of `model` and `meta` under the name "description"
             (one key, because safetensors writes several in random order; so equal weights make equal files)
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vitscale.base.errors import EnvironmentFault, UsageError
from vitscale.base.files import fsync_path, publish, temporary_beside, xxh3_64
from vitscale.config import model_from_record
from vitscale.model.config import ModelConfig
from vitscale.model.flops import parameter_shapes
from vitscale.model.position import resize_patch_kernel, resize_positions

SCHEMA_VERSION = 1
METADATA_KEY = "vitscale"


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The values of a model and what is known about them."""

    model: ModelConfig
    tensors: dict[str, Tensor]
    """By parameter name; exactly those of VisionTransformer(model)."""
    meta: dict[str, str] = field(default_factory=dict)
    """"classes": JSON list of class names, label 0 first; "eval_crop": as in augment.eval_crop; "objective" and
    "masked_classes" (JSON list): as in train; "source" (the run), "step": where the weights come from."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, empty when none are known."""
        return tuple(json.loads(self.meta.get("classes", "[]")))

    @property
    def eval_crop(self) -> float:
        """Share of the image that evaluation sees (augment.eval_crop); all of it where nothing is known."""
        return float(self.meta.get("eval_crop", "1.0"))

    @property
    def masked_classes(self) -> tuple[int, ...]:
        """Classes that took no part in training and are never predicted."""
        return tuple(json.loads(self.meta.get("masked_classes", "[]")))


def save_weights(path: Path, weights: Weights) -> None:
    """Write the file whole or not at all. Equal weights give equal bytes."""
    difference = _difference_to_model(weights.model, weights.tensors)
    assert difference is None, difference
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.tensors.items()}
    description = {"model": dataclasses.asdict(weights.model), "meta": weights.meta}
    hashes = {"description": _hash_of_description(description)} | {name: _hash_of(tensor) for name, tensor in tensors.items()}
    record = {"schema_version": SCHEMA_VERSION, **description, "xxh3": hashes}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_beside(path) as temporary:
            save_file(tensors, temporary, metadata={METADATA_KEY: json.dumps(record, sort_keys=True)})
            fsync_path(temporary)
            publish(temporary, path)
    except (OSError, SafetensorError) as error:
        raise EnvironmentFault(f"the weights cannot be written to {path} ({error}); give a place with room") from None


def load_weights(path: Path) -> Weights:
    """Read a file of save_weights to the CPU, every tensor checked against its hash.

    Raises EnvironmentFault when the file is missing, damaged, or was written by something else.
    """
    if not path.is_file():
        raise EnvironmentFault(f"expected a weights file at {path}, found {'a directory' if path.is_dir() else 'none'}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            record = json.loads(metadata[METADATA_KEY]) if METADATA_KEY in metadata else None
            tensors = {name: file.get_tensor(name) for name in file.keys()} if record else {}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError, ValueError) as error:
        raise EnvironmentFault(f"{path} cannot be read as safetensors ({error}); restore it from a copy") from None
    if record is None:
        raise EnvironmentFault(
            f"{path}: expected weights saved by vitscale, got safetensors of another origin; convert them first"
        )
    if record.get("schema_version") != SCHEMA_VERSION:
        raise EnvironmentFault(
            f"{path}: expected schema_version {SCHEMA_VERSION}, got {record.get('schema_version')!r}; "
            "read it with the vitscale version that wrote it"
        )
    try:
        weights = Weights(model=model_from_record(record["model"]), tensors=tensors, meta=dict(record["meta"]))
        hashes: dict[str, str] = dict(record["xxh3"])
        found = {"description": _hash_of_description({"model": record["model"], "meta": record["meta"]})}
    except (KeyError, TypeError, ValueError, UsageError) as error:
        raise EnvironmentFault(f"{path}: its description is damaged ({error}); restore it from a copy") from None
    found |= {name: _hash_of(tensor) for name, tensor in tensors.items()}
    if damaged := sorted(name for name in found if hashes.get(name) != found[name]):
        raise EnvironmentFault(f"{path}: {damaged[0]} does not match its checksum; restore it from a copy")
    if difference := _difference_to_model(weights.model, tensors):
        raise EnvironmentFault(f"{path}: {difference}; restore it from a copy")
    return weights


def _hash_of(tensor: Tensor) -> str:
    return f"{xxh3_64(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()):016x}"


def _hash_of_description(description: dict[str, Any]) -> str:
    return f"{xxh3_64(json.dumps(description, sort_keys=True).encode()):016x}"


def _difference_to_model(model: ModelConfig, tensors: dict[str, Tensor]) -> str | None:
    expected = parameter_shapes(model)
    for name in sorted({*expected, *tensors}):
        want = expected.get(name)
        got = tuple(tensors[name].shape) if name in tensors else None
        if got != want:
            return f"expected {name} {_shape(want)} for its model, got {_shape(got)}"
    return None


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else f"of shape {shape}"


# ---- another task -----------------------------------------------------------------------------------------------------


# What two models may differ in and still share every tensor, or all but those that fit_to makes fit.
FREE = ("classes", "image_size", "patch_size", "position_resize", "layer_scale")


def fit_to(weights: Weights, model: ModelConfig, *, new_head: bool = False) -> dict[str, Tensor]:
    """The tensors a fine-tuning of `model` starts from; what is not among them comes from `initialise`.

    The head is left out when the number of classes differs, or when asked for (the same number of other classes).
    Learned positions are resampled when the grid differs, in the dialect of `model.position_resize`; the patch
    projection by pi-resize when patch_size differs. Any other difference raises UsageError.
    """
    old = weights.model
    for name in (f.name for f in dataclasses.fields(ModelConfig)):
        have, want = _value(old, name), _value(model, name)
        if have != want and (name not in FREE or (have is None) != (want is None)):
            raise UsageError(
                f"the weights were trained with model.{name}={have}, this run asks for {want}; "
                f"set model.{name}={_spell(have)} or start from other weights"
            )
    tensors = dict(weights.tensors)
    if new_head or old.classes != model.classes:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
    if model.position == "learned":
        prefix = old.prefix_tokens if old.prefix_positions else 0
        grids = ((m.grid, m.grid) for m in (old, model))
        tensors["pos_embed"] = resize_positions(tensors["pos_embed"], *grids, prefix=prefix, dialect=model.position_resize)
    if old.patch_size != model.patch_size:
        kernel_DCPP = tensors["patch_embed.proj.weight"].reshape(-1, old.channels, old.patch_size, old.patch_size)
        dialect = "pi_bilinear" if model.position_resize == "zoom_linear" else "pi_bicubic"
        resized = resize_patch_kernel(kernel_DCPP, model.patch_size, dialect=dialect)
        tensors["patch_embed.proj.weight"] = resized.reshape(model.width, -1)
    return tensors


def _value(model: ModelConfig, name: str) -> Any:
    return model.feedforward_width if name == "mlp_width" else getattr(model, name)


def _spell(value: Any) -> str:
    """As the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
