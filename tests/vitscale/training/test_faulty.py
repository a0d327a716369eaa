"""A number changed on purpose is changed there, by exactly what was asked for, and nowhere else."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from vitscale.base.errors import UsageError
from vitscale.base.faults import Fault
from vitscale.training.faulty import damage_weights, faulty_loss, flip_bit
from vitscale.training.objective import Loss


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_each_bit_can_be_flipped_and_flipped_back(dtype):
    tensor = torch.tensor([[1.5, -2.25], [0.0, 3.0]], dtype=dtype)
    whole = tensor.clone()
    for bit in range(8 * tensor.element_size()):
        fault = Fault(action="bitflip", point="step.weights", element=3, bit=bit)
        flip_bit(tensor, fault)
        assert torch.equal(tensor.view(-1)[:3], whole.view(-1)[:3])
        assert tensor[1, 1].item() != 3.0
        flip_bit(tensor, fault)
        assert torch.equal(tensor, whole)


def test_the_sign_bit_is_the_sign():
    tensor = torch.tensor([2.0])
    flip_bit(tensor, Fault(action="bitflip", point="step.weights", bit=31))
    assert tensor.item() == -2.0


def loss_of(weight: torch.Tensor) -> Loss:
    loss = (3 * weight).sum()
    return Loss(loss, loss.detach())


def test_a_nan_loss_reaches_the_gradient(monkeypatch):
    monkeypatch.setenv("VITSCALE_FAULT", "nan@step.loss:rank=1:step=4")
    weight = torch.ones(2, requires_grad=True)
    for here in ({"rank": 0, "step": 4}, {"rank": 1, "step": 3}):
        assert faulty_loss(loss_of(weight), **here).trained.item() == 6.0
    loss = faulty_loss(loss_of(weight), rank=1, step=4)
    loss.trained.backward()
    assert loss.reported.isnan() and weight.grad.isnan().all()


def test_a_flipped_loss_leaves_the_gradient(monkeypatch):
    monkeypatch.setenv("VITSCALE_FAULT", "bitflip@step.loss:bit=31")
    weight = torch.ones(2, requires_grad=True)
    loss = faulty_loss(loss_of(weight), rank=0, step=1)
    loss.trained.backward()
    assert loss.trained.item() == loss.reported.item() == -6.0
    assert weight.grad.tolist() == [3.0, 3.0]


def test_one_element_of_one_parameter_is_damaged(monkeypatch):
    """Parameters without elements, as ZeRO 3 leaves them behind, are not counted."""
    module = nn.ParameterList([nn.Parameter(torch.empty(0)), nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))])
    monkeypatch.setenv(
        "VITSCALE_FAULT", "bitflip@step.weights:step=7:tensor=1:element=2:bit=31;nan@step.weights:step=8:element=1"
    )
    engine: Any = SimpleNamespace(module=module, rank=0)
    damage_weights(engine, step=7)
    assert module[2].tolist() == [[1.0, 1.0], [-1.0, 1.0]] and module[1].tolist() == [1.0, 1.0, 1.0]
    damage_weights(engine, step=8)
    assert module[1].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("tensor=2", "holds 2 whole parameters, there is no tensor=2"),
        ("element=9", "has 3 elements, there is no element=9"),
        ("bit=32", "4 bytes has no bit=32"),
    ],
)
def test_a_place_that_is_not_there_is_refused(monkeypatch, how, said):
    monkeypatch.setenv("VITSCALE_FAULT", f"bitflip@step.weights:{how}")
    engine: Any = SimpleNamespace(module=nn.ParameterList([nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]), rank=0)
    with pytest.raises(UsageError, match=said):
        damage_weights(engine, step=1)
