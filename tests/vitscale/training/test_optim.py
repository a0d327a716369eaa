"""Every number is updated by the rule, the factor and the decay of the parameter it belongs to."""

import copy

import pytest
import torch
from torch import Tensor

from vitscale.config import OptimConfig
from vitscale.model.config import ModelConfig
from vitscale.model.vit import VisionTransformer, layer_of
from vitscale.training import optim as optim_module
from vitscale.training.muon import newton_schulz
from vitscale.training.optim import PartitionOptimizer, Role, make_optimizer
from vitscale.training.pieces import Partition, Piece

PEAK = 0.1
BASE = {"global_batch": 96, "peak_lr": PEAK, "weight_decay": 0.05, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6}

# The parameters that decay, by hand: every weight of a linear map, nothing else.
DECAYED = [
    "patch_embed.proj.weight",
    *[f"blocks.{n}.{name}.weight" for n in (0, 1) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")],
    "head.weight",
]


def model_of(**settings) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        ModelConfig(**{"image_size": 8, "patch_size": 2, "width": 8, "depth": 2, "heads": 2, "classes": 3, **settings})
    )


def optimizer_of(model: VisionTransformer, **settings) -> PartitionOptimizer:
    optimizer = make_optimizer(model, optim=OptimConfig(**{**BASE, **settings}))
    assert isinstance(optimizer, PartitionOptimizer)
    return optimizer


def gradient_of(name: str, parameter: Tensor, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(len(name) + 1000 * step)
    return torch.randn(parameter.shape, generator=generator)


def steps(model: VisionTransformer, optimizer: torch.optim.Optimizer, rates: list[float]) -> None:
    for step, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("factor", 1.0)
        for name, parameter in model.named_parameters():
            parameter.grad = gradient_of(name, parameter, step)
        optimizer.step()


RATES = [0.05, 0.1, 0.02, 0.1]


def factor_by_hand(name: str) -> float:
    """layer_decay = 0.5 with two blocks: embeddings 1/8, blocks 1/4 and 1/2, all behind them 1."""
    if name.startswith("blocks."):
        return {"0": 0.25, "1": 0.5}[name.split(".")[1]]
    return 0.125 if name.startswith(("patch_embed", "cls_token", "pos_embed", "reg_token")) else 1.0


def decay_by_hand(name: str) -> float:
    return 0.0 if name not in DECAYED else 0.7 if name == "head.weight" else 0.05


LAYERED = {"layer_decay": 0.5, "head_weight_decay": 0.7}


def expected_after(rule: str) -> dict[str, Tensor]:
    """torch's AdamW with a group per parameter, or the formulas."""
    model = model_of()
    named = dict(model.named_parameters())
    if rule == "adamw":
        groups = [{"params": [p], "weight_decay": decay_by_hand(n), "factor": factor_by_hand(n)} for n, p in named.items()]
        steps(model, torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-6), RATES)
        return {name: p.detach() for name, p in named.items()}
    whole = {}
    for name, parameter in named.items():
        w, m = parameter.detach().double(), torch.zeros_like(parameter, dtype=torch.float64)
        for step, rate in enumerate(RATES):
            g, lr = gradient_of(name, parameter, step).double(), rate * factor_by_hand(name)
            if rule == "lion":
                update, m = (0.8 * m + 0.2 * g).sign(), 0.95 * m + 0.05 * g
            else:
                update = m = 0.9 * m + g
            w = w - lr * decay_by_hand(name) * w - lr * update
        whole[name] = w.float()
    return whole


@pytest.mark.parametrize("rule", ["adamw", "lion", "sgd"])
@pytest.mark.parametrize("chunk", [1 << 22, 100])
def test_layer_decay_and_weight_decay_masks_equal_a_group_per_parameter(rule, chunk, monkeypatch):
    monkeypatch.setattr(optim_module, "CHUNK", chunk)
    model = model_of()
    steps(model, optimizer_of(model, optimizer=rule, **LAYERED), RATES)
    for name, expected in expected_after(rule).items():
        # Four steps in float32: some ulp of numbers up to 2.
        torch.testing.assert_close(model.get_parameter(name).detach(), expected, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("rule", ["adamw", "lion", "sgd", "muon"])
def test_a_bfloat16_moment_is_the_float32_moment_rounded_after_each_step(rule, monkeypatch):
    monkeypatch.setattr(optim_module, "CHUNK", 50)
    model, rounded = model_of(), model_of()
    ours = optimizer_of(model, optimizer=rule, moment_dtype="bf16", **LAYERED)
    reference = optimizer_of(rounded, optimizer=rule, **LAYERED)
    for step in range(4):
        for name, parameter in [*model.named_parameters(), *rounded.named_parameters()]:
            parameter.grad = gradient_of(name, parameter, step)
        ours.step()
        reference.step()
        for state in reference.state.values():
            state["exp_avg"].copy_(state["exp_avg"].bfloat16())
    assert all(state["exp_avg"].dtype == torch.bfloat16 for state in ours.state.values())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, rounded.get_parameter(name), rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("rule", ["adamw", "lion", "sgd", "muon"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_state_saved_and_loaded_goes_on_bit_for_bit(rule, dtype):
    settings = {"optimizer": rule, "moment_dtype": dtype, **LAYERED}
    model, restored = model_of(), model_of()
    optimizer = optimizer_of(model, **settings)
    steps(model, optimizer, RATES[:2])
    restored.load_state_dict(model.state_dict())
    again = optimizer_of(restored, **settings)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(model, optimizer, RATES[2:])
    steps(restored, again, RATES[2:])
    for (name, a), b in zip(model.named_parameters(), restored.parameters(), strict=True):
        assert torch.equal(a, b), name
    counters = [state["step"] for state in again.state.values() if "step" in state]
    assert len({counter.data_ptr() for counter in counters}) == len(counters), "counters share storage"


def test_pieces_of_a_flat_partition_are_updated_as_their_parameters_and_padding_never():
    """Two partitions that cut a parameter in two, with padding between pieces and at the end, as ZeRO makes them."""
    model = model_of()
    optimizer = optimizer_of(model, **LAYERED)
    named = dict(model.named_parameters())
    width = 701  # cuts parameters anywhere
    places, at = [], 0
    for name in sorted(named):
        start = 0
        while start < named[name].numel():
            numel = min(named[name].numel() - start, width - at % width)
            places.append((at // width, Piece(name=name, shape=(), start=start, numel=numel, offset=at % width)))
            start, at = start + numel, at + numel
        at += 3
    flats = [torch.full((width,), 7.0, requires_grad=True) for _ in range(at // width + 1)]
    gradients = [torch.full((width,), 9.0) for _ in flats]
    for group, piece in places:
        part, source = slice(piece.offset, piece.offset + piece.numel), slice(piece.start, piece.start + piece.numel)
        flats[group].data[part] = named[piece.name].detach().flatten()[source]
        gradients[group][part] = gradient_of(piece.name, named[piece.name], 0).flatten()[source]
    optimizer.param_groups[0]["params"] = flats
    optimizer.param_groups[0]["lr"] = RATES[0]
    optimizer.attach(
        [
            Partition(key=str(n), master=flat, pieces=tuple(piece for group, piece in places if group == n), shapes={})
            for n, flat in enumerate(flats)
        ]
    )
    for flat, gradient in zip(flats, gradients, strict=True):
        flat.grad = gradient
    optimizer.step()
    assert all(state["exp_avg"].shape == (width,) and state["step"] == 1 for state in optimizer.state.values())

    steps(model, optimizer_of(model, **LAYERED), RATES[:1])
    is_padding = [torch.ones(width, dtype=torch.bool) for _ in flats]
    for group, piece in places:
        part, source = slice(piece.offset, piece.offset + piece.numel), slice(piece.start, piece.start + piece.numel)
        torch.testing.assert_close(flats[group][part], named[piece.name].flatten()[source], rtol=1e-6, atol=1e-7)
        is_padding[group][part] = False
    assert len(flats) > 1 and all((flat[padding] == 7).all() for flat, padding in zip(flats, is_padding, strict=True))


def test_exactly_the_matrices_decay():
    model = model_of(registers=1)
    optimizer = optimizer_of(model)
    roles = {name: {span.role for span in optimizer._spans[id(parameter)]} for name, parameter in model.named_parameters()}
    assert {name for name, role in roles.items() if role == {Role(rule="adamw", lr_factor=1.0, weight_decay=0.05)}} == set(
        DECAYED
    )
    assert {
        name for name, role in roles.items() if role == {Role(rule="adamw", lr_factor=1.0, weight_decay=0.0)}
    } == roles.keys() - set(DECAYED)


def test_zero_gets_one_group_with_the_matrices_in_front():
    model = model_of()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    (group,) = optimizer_of(model, **LAYERED).param_groups
    assert [names[id(p)] for p in group["params"]][: len(DECAYED)] == DECAYED
    assert sorted(names[id(p)] for p in group["params"]) == sorted(names.values())


def test_every_parameter_has_a_layer():
    """BEiT and MAE: embeddings 0, block l (from 0) l + 1, what follows the blocks depth + 1."""
    model = model_of(registers=2, pool="map", pre_logits_width=4, norm="respost", layer_scale=0.1)
    layers = {name: layer_of(name, depth=2) for name, _ in model.named_parameters()}
    embeddings = {"cls_token", "reg_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert {name for name, layer in layers.items() if layer == 0} == embeddings
    for block in (0, 1):
        inside = {name for name in layers if name.startswith(f"blocks.{block}.")}
        assert {name for name, layer in layers.items() if layer == block + 1} == inside != set()
    rest = {name.split(".")[0] for name, layer in layers.items() if layer == 3}
    assert rest == {"norm", "attn_pool", "pre_logits", "head"}


def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest_at_its_own_rate():
    model = model_of()
    optimizer = optimizer_of(model, optimizer="muon", adam_lr=PEAK / 4, layer_decay=0.5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    adamw, muon = ([names[id(p)] for p in group["params"]] for group in optimizer.param_groups)
    assert muon == DECAYED[1:-1] and sorted(adamw + muon) == sorted(names.values())
    assert optimizer._roles["head.bias"] == Role(rule="adamw", lr_factor=0.25, weight_decay=0.0)
    assert optimizer._roles["blocks.1.mlp.fc1.weight"] == Role(rule="muon", lr_factor=0.5, weight_decay=0.05)


@pytest.mark.parametrize("shape", [(24, 8), (8, 32), (16, 16)])
def test_muon_makes_singular_values_nearly_equal(shape):
    momentum = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    values = torch.linalg.svdvals(newton_schulz(momentum[None])[0])
    assert (
        values.min() > 0.6
        and values.max() < 1.3
        and torch.linalg.svdvals(momentum).min() < 0.7 * torch.linalg.svdvals(momentum).max()
    )


def test_frozen_parameters_are_left_out():
    model = model_of()
    model.head.weight.requires_grad = False
    optimizer = optimizer_of(model)
    assert not any(p is model.head.weight for group in optimizer.param_groups for p in group["params"])


def test_without_gradients_nothing_moves():
    model = model_of()
    optimizer = optimizer_of(model)
    steps(model, optimizer, RATES[:1])
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(state["step"] == 1 for state in optimizer.state.values())
