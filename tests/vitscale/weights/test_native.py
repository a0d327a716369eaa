"""A weights file comes back bit for bit or not at all; fine-tuning takes what fits and says what does not."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from vitscale.base.errors import EnvironmentFault, UsageError
from vitscale.model.config import ModelConfig
from vitscale.model.position import resize_patch_kernel, resize_positions
from vitscale.model.vit import VisionTransformer, initialise
from vitscale.weights.native import Weights, fit_to, load_weights, save_weights


def config(**changes) -> ModelConfig:
    return ModelConfig(**({"image_size": 8, "patch_size": 4, "width": 12, "depth": 2, "heads": 3, "classes": 5} | changes))


def weights_of(model_config: ModelConfig, dtype: torch.dtype = torch.float32) -> Weights:
    model = VisionTransformer(model_config)
    initialise(model, seed=0)
    with torch.no_grad():
        model.head.weight.normal_(generator=torch.Generator().manual_seed(1))
    tensors = {name: parameter.detach().to(dtype) for name, parameter in model.named_parameters()}
    return Weights(model=model_config, tensors=tensors, meta={"classes": json.dumps(["kö", "b"]), "step": "12"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("more", [{}, {"norm": "post", "projection_bias": False, "position": "sinusoidal", "mlp_width": 7}])
def test_weights_come_back_bit_for_bit(tmp_path, dtype, more):
    weights = weights_of(config(**more), dtype)
    save_weights(tmp_path / "new" / "w.safetensors", weights)
    back = load_weights(tmp_path / "new" / "w.safetensors")
    assert back.model == weights.model and back.meta == weights.meta and back.classes == ("kö", "b")
    assert back.tensors.keys() == weights.tensors.keys()
    for name, tensor in weights.tensors.items():
        assert back.tensors[name].dtype == dtype and torch.equal(back.tensors[name], tensor), name
    VisionTransformer(back.model).load_state_dict(back.tensors)
    assert os.listdir(tmp_path / "new") == ["w.safetensors"], "no temporary file is left"


def test_equal_weights_make_equal_files_in_every_process(tmp_path):
    code = (
        "import sys, torch; from pathlib import Path\n"
        "from vitscale.weights.native import load_weights, save_weights\n"
        "save_weights(Path(sys.argv[2]), load_weights(Path(sys.argv[1])))"
    )
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    save_weights(paths[0], weights_of(config()))
    subprocess.run([sys.executable, "-c", code, *paths], check=True)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_any_flipped_or_missing_byte_is_found(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(path, weights_of(config(depth=1)))
    whole = path.read_bytes()
    header_bytes = 8 + int.from_bytes(whole[:8], "little")
    for place in [*range(0, header_bytes, 7), header_bytes + 1, len(whole) - 1]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(EnvironmentFault, match=r"w\.safetensors"):
            load_weights(path)
    for length in [0, 5, 100, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(EnvironmentFault, match=r"w\.safetensors.*restore it from a copy"):
            load_weights(path)


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(EnvironmentFault, match="found none"):
        load_weights(tmp_path / "absent.safetensors")
    with pytest.raises(EnvironmentFault, match="found a directory"):
        load_weights(tmp_path)
    save_file({"x": torch.zeros(2)}, tmp_path / "foreign.safetensors", metadata={"format": "pt"})
    with pytest.raises(EnvironmentFault, match="of another origin"):
        load_weights(tmp_path / "foreign.safetensors")
    record = json.dumps({"schema_version": 99})
    save_file({"x": torch.zeros(2)}, tmp_path / "later.safetensors", metadata={"vitscale": record})
    with pytest.raises(EnvironmentFault, match="expected schema_version 1, got 99"):
        load_weights(tmp_path / "later.safetensors")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    save_weights(path, weights_of(config()))
    old = path.read_bytes()
    monkeypatch.setattr("vitscale.weights.native.fsync_path", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(EnvironmentFault, match="disk full"):
        save_weights(path, weights_of(config(depth=1)))
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["w.safetensors"]


def test_an_equal_model_takes_everything():
    weights = weights_of(config())
    fitted = fit_to(weights, config(mlp_width=48))  # 4 * width, spelled out
    assert fitted.keys() == weights.tensors.keys()
    assert all(torch.equal(fitted[name], tensor) for name, tensor in weights.tensors.items())


@pytest.mark.parametrize(("classes", "new_head"), [(7, False), (5, True), (7, True)])
def test_other_classes_drop_the_head_and_nothing_else(classes, new_head):
    weights = weights_of(config())
    fitted = fit_to(weights, config(classes=classes), new_head=new_head)
    assert weights.tensors.keys() - fitted.keys() == {"head.weight", "head.bias"}
    model = VisionTransformer(config(classes=classes))
    initialise(model, seed=0)
    missing, unexpected = model.load_state_dict(fitted, strict=False)
    assert set(missing) == {"head.weight", "head.bias"} and not unexpected
    assert torch.equal(model.blocks[1].mlp.fc1.weight, weights.tensors["blocks.1.mlp.fc1.weight"])


def test_another_image_size_resamples_learned_positions_only():
    weights = weights_of(config(classes=5))
    fitted = fit_to(weights, config(image_size=20))
    assert torch.equal(
        fitted["pos_embed"],
        resize_positions(weights.tensors["pos_embed"], (2, 2), (5, 5), prefix=1, dialect="bicubic_antialias"),
    )
    changed = [name for name, tensor in weights.tensors.items() if not torch.equal(fitted[name], tensor)]
    assert changed == ["pos_embed"]
    VisionTransformer(config(image_size=20)).load_state_dict(fitted)
    fixed = weights_of(config(position="sinusoidal"))
    VisionTransformer(config(position="sinusoidal", image_size=20)).load_state_dict(
        fit_to(fixed, config(position="sinusoidal", image_size=20))
    )


@pytest.mark.parametrize(("resize", "dialect"), [("bicubic_antialias", "pi_bicubic"), ("zoom_linear", "pi_bilinear")])
def test_other_patches_get_the_kernel_and_the_positions_resized(resize, dialect):
    weights = weights_of(config(image_size=16))
    fitted = fit_to(weights, config(image_size=16, patch_size=8, position_resize=resize))
    kernel = weights.tensors["patch_embed.proj.weight"].reshape(12, 3, 4, 4)
    expected = resize_patch_kernel(kernel, 8, dialect=dialect).reshape(12, -1)
    assert torch.equal(fitted["patch_embed.proj.weight"], expected)
    assert fitted["pos_embed"].shape == (1, 5, 12)
    VisionTransformer(config(image_size=16, patch_size=8)).load_state_dict(fitted)


def test_a_flat_patch_enlarged_gives_the_same_token():
    """The law of pi-resize, where it is exact: what is constant over a patch stays so when the patch grows."""
    kernel = torch.randn(6, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for dialect in ("pi_bicubic", "pi_bilinear"):
        grown = resize_patch_kernel(kernel, 8, dialect=dialect)
        torch.testing.assert_close(grown.sum((2, 3)), kernel.sum((2, 3)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"width": 24}, "trained with model.width=12, this run asks for 24; set model.width=12 or"),
        ({"depth": 3}, "trained with model.depth=2, this run asks for 3"),
        ({"norm": "post"}, "trained with model.norm=pre, this run asks for post; set model.norm=pre or"),
        ({"mlp_width": 20}, "trained with model.mlp_width=48, this run asks for 20; set model.mlp_width=48 or"),
        ({"projection_bias": False}, "this run asks for False; set model.projection_bias=true or"),
        ({"layer_scale": 0.1}, "trained with model.layer_scale=None, this run asks for 0.1"),
        ({"pixel_mean": (0.1, 0.2, 0.3)}, "set model.pixel_mean=[0.5,0.5,0.5] or"),
        ({"heads": 4, "norm_eps": 1e-5}, "trained with model.heads=3, this run asks for 4"),
    ],
)
def test_every_other_difference_is_refused_by_name(change, sentence):
    with pytest.raises(UsageError) as refusal:
        fit_to(weights_of(config()), config(**change))
    assert sentence in str(refusal.value)
