"""Numbers changed on purpose where VITSCALE_FAULT asks for it (vitscale/base/faults.py): not a number, or one bit flipped.

VITSCALE_FAULT="nan@step.loss:rank=1:step=7"                              the loss of one micro-batch of one rank
VITSCALE_FAULT="bitflip@step.weights:rank=0:step=7:tensor=3:element=5:bit=30"   what a bad memory cell does to one copy
"""

import math

import torch
from torch import Tensor

from vitscale.base.errors import UsageError
from vitscale.base.faults import VARIABLE, Fault, changes_at
from vitscale.training.engine import Engine
from vitscale.training.objective import Loss

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def faulty_loss(loss: Loss, **here: int) -> Loss:
    """The loss of a micro-batch, changed where `step.loss` is asked for; a NaN reaches the gradient, a flipped bit does not."""
    for fault in changes_at("step.loss", **here):
        if fault.action == "nan":
            loss = Loss(loss.trained * math.nan, loss.reported * math.nan)
        else:
            wrong = loss.reported.clone()
            flip_bit(wrong, fault)
            loss = Loss(loss.trained + (wrong - loss.reported), wrong)
    return loss


def damage_weights(engine: Engine, *, step: int) -> None:
    """Change one number of one parameter on this rank where `step.weights` is asked for: `tensor` counts those held whole."""
    for fault in changes_at("step.weights", rank=engine.rank, step=step):
        whole = [parameter.data for parameter in engine.module.parameters() if parameter.numel()]
        if fault.tensor >= len(whole):
            raise UsageError(f"{VARIABLE}: this rank holds {len(whole)} whole parameters, there is no tensor={fault.tensor}")
        if fault.action == "nan":
            _element(whole[fault.tensor], fault).fill_(math.nan)
        else:
            flip_bit(whole[fault.tensor], fault)


def flip_bit(tensor: Tensor, fault: Fault) -> None:
    """Flip the bit of the element that the fault names, in place, on whatever device."""
    element = _element(tensor, fault)
    if fault.bit >= 8 * tensor.element_size():
        raise UsageError(f"{VARIABLE}: a number of {tensor.element_size()} bytes has no bit={fault.bit}")
    bits = element.view(_INTEGERS[tensor.element_size()])
    sign_bit = 8 * tensor.element_size() - 1
    bits ^= 1 << fault.bit if fault.bit < sign_bit else -1 << sign_bit


def _element(tensor: Tensor, fault: Fault) -> Tensor:
    flat = tensor.detach().view(-1)
    if fault.element >= flat.numel():
        raise UsageError(f"{VARIABLE}: the tensor has {flat.numel()} elements, there is no element={fault.element}")
    return flat[fault.element : fault.element + 1]
