"""Weights of other libraries come back array for array, and what a format cannot hold is refused by name."""

import json
import zipfile

import numpy as np
import pytest
import torch

from vitscale.base.errors import EnvironmentFault, UsageError
from vitscale.model.config import ModelConfig
from vitscale.model.flops import parameter_shapes
from vitscale.weights.foreign import identity_of_foreign, load_any, read_npz, save_directory, save_npz
from vitscale.weights.huggingface import from_huggingface, preprocessor, to_huggingface
from vitscale.weights.jax import to_jax
from vitscale.weights.mapping import grouped
from vitscale.weights.native import Weights
from vitscale.weights.timm import from_timm, to_timm


def weights_of(dtype: torch.dtype = torch.float32, **changes) -> Weights:
    sizes = {"image_size": 8, "patch_size": 4, "width": 12, "depth": 2, "heads": 3, "classes": 5, "activation": "gelu_tanh"}
    model = ModelConfig(**(sizes | changes))
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in parameter_shapes(model).items()}
    return Weights(model=model, tensors=tensors, meta={"classes": json.dumps(list("abcde"))})


def assert_equal(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("scheme", "prefix", "scan", "changes"),
    [
        ("vision_transformer", "", False, {"pre_logits_width": 6}),
        ("vision_transformer", "opt/target/", False, {}),
        ("big_vision", "", False, {"prefix_positions": False}),
        ("big_vision", "params/", True, {"class_token": False, "pool": "average"}),
        ("big_vision", "params/img/", True, {"class_token": False, "pool": "map"}),
    ],
)
def test_an_npz_comes_back_byte_for_byte(tmp_path, dtype, scheme, prefix, scan, changes):
    weights = weights_of(dtype, **changes)
    save_npz(tmp_path / "a.npz", to_jax(weights, scheme=scheme, prefix=prefix, scan=scan).tensors)
    back = load_any(tmp_path / "a.npz")
    assert_equal(back.tensors, weights.tensors)
    assert (back.meta["npz_scheme"], back.meta["npz_prefix"], back.meta["npz_scan"]) == (scheme, prefix, str(int(scan)))
    save_npz(tmp_path / "b.npz", to_jax(back, scheme=scheme, prefix=prefix, scan=scan).tensors)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_folds_of_the_class_token_are_recorded():
    foreign = to_jax(weights_of(), scheme="big_vision")
    assert foreign.folds == ("the class token's row of the positions is added to the class token",)
    assert to_timm(weights_of(position="sincos2d_bv")).folds == ("model.position=sincos2d_bv is written as a learned table",)


@pytest.mark.parametrize("changes", [{}, {"registers": 2, "prefix_positions": False}, {"qk_norm": True, "layer_scale": 0.1}])
def test_a_timm_directory_comes_back(tmp_path, changes):
    weights = weights_of(**changes)
    save_directory(tmp_path / "t", to_timm(weights))
    back = load_any(tmp_path / "t")
    assert_equal(back.tensors, weights.tensors)
    assert back.classes == tuple("abcde") and back.model.heads == 3 and back.model.activation == "gelu_tanh"
    with pytest.raises(UsageError, match="which exists"):
        save_directory(tmp_path / "t", to_timm(weights))


@pytest.mark.parametrize("naming", ["current", "older"])
def test_a_hugging_face_directory_comes_back(tmp_path, naming):
    weights = weights_of(norm_eps=1e-12, qkv_bias=False)
    foreign = to_huggingface(weights, naming=naming)
    save_directory(tmp_path / "h", foreign, pixels=preprocessor(weights))
    back = load_any(tmp_path / "h")
    assert_equal(back.tensors, weights.tensors)
    assert_equal(to_huggingface(back, naming=naming).tensors, foreign.tensors)
    assert back.classes == tuple("abcde") and back.model.norm_eps == 1e-12 and not back.model.qkv_bias
    assert len(identity_of_foreign(tmp_path / "h")) == 64


@pytest.mark.parametrize(
    ("convert", "changes", "name"),
    [
        (to_timm, {"norm": "post"}, "model.norm=pre"),
        (to_timm, {"norm": "deepnorm"}, "these weights have deepnorm"),
        (to_timm, {"parallel": True}, "model.parallel"),
        (to_timm, {"pre_logits_width": 4}, "model.pre_logits_width"),
        (to_timm, {"position": "rotary"}, "model.position"),
        (to_huggingface, {"registers": 1}, "model.registers"),
        (to_huggingface, {"norm_kind": "rmsnorm"}, "model.norm_kind"),
        (to_jax, {"activation": "gelu"}, "model.activation"),
        (to_jax, {"qk_norm": True}, "model.qk_norm"),
        (to_jax, {"pixel_mean": (0.4, 0.4, 0.4)}, "model.pixel_mean"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_by_name(convert, changes, name):
    changes = {"position": "learned", "width": 24} | changes
    with pytest.raises(UsageError, match=name):
        convert(weights_of(**changes))


def test_damaged_and_unknown_files_are_one_sentence(tmp_path):
    np.savez(tmp_path / "objects.npz", a=np.array([{}], dtype=object))
    with pytest.raises(EnvironmentFault, match="cannot be read as npz"):
        read_npz(tmp_path / "objects.npz")
    save_npz(tmp_path / "a.npz", to_jax(weights_of()).tensors)
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "short.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EnvironmentFault, match=r"short\.npz"):
        load_any(tmp_path / "short.npz")
    with zipfile.ZipFile(tmp_path / "empty.npz", "w"):
        pass
    with pytest.raises(UsageError, match="expected an array embedding/kernel"):
        load_any(tmp_path / "empty.npz")
    with pytest.raises(UsageError, match="expected model_type vit, got 'bert'"):
        from_huggingface({}, {"model_type": "bert"})
    (tmp_path / "d").mkdir()
    with pytest.raises(EnvironmentFault, match=r"config\.json"):
        load_any(tmp_path / "d")


def test_the_mapping_reads_block_by_block():
    lines = grouped(to_huggingface(weights_of()).rows)
    want = "blocks.{i}.mlp.fc1.weight <- vit.layers.{i}.mlp.fc1.weight (as it is), i = 0..1"
    assert want in lines and len(lines) == len(set(lines)) < 25


def test_heads_that_cannot_be_known_are_asked_for():
    tensors = dict(to_timm(weights_of(width=12, heads=3)).tensors)
    with pytest.raises(UsageError, match="width 12 is none of timm's own, so its heads are unknown; add num_heads"):
        from_timm(tensors, {"architecture": "vit_small_patch4_8"})
