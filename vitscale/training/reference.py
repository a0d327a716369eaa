"""Plain torch training of the same model: what every gradient of the engine is measured against.

float32, one process, no DeepSpeed, no recomputation, no compilation, no flat partitions: the micro-batches of a global
batch one after the other in the order of their slots, the mean of their gradients, torch's own clipping and optimizer.
The loss is a function that the caller closes over its images, so that any objective fits:

    model = plain_model(config.model, seed=0)
    objective = Objective(model=config.model, label_smoothing=0.0, device=CPU, dtype=torch.float32)
    steps = train_plainly(
        model,
        lambda forward, step, k: objective(forward, images[step][k], labels[step][k]),
        steps=10,
        micro_batches=4,
        optimizer=make_optimizer(model, optim=config.optim),
        clip=config.optim.clip,
    )
    steps[3].loss, steps[3].norm, steps[3].gradients["blocks.0.mlp.fc1.weight"]
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitscale.model.config import ModelConfig
from vitscale.model.vit import VisionTransformer, initialise

Forward = Callable[[Tensor], Tensor]
"""Images of shape (B, C, H, W), normalised, to logits of shape (B, classes)."""
Loss = Callable[[Forward, int], Tensor]
"""(forward, micro-batch) to the mean loss of that micro-batch, a scalar."""
StepLoss = Callable[[Forward, int, int], Tensor]
"""The same of (forward, step, micro-batch)."""


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Of one global batch, before clipping."""

    losses: list[float]
    """Mean loss of each micro-batch."""
    gradients: dict[str, Tensor]
    """Mean over the micro-batches, float32, by the name of the parameter."""

    @property
    def loss(self) -> float:
        """Mean over the global batch: all micro-batches are of one size."""
        return sum(self.losses) / len(self.losses)

    @property
    def norm(self) -> float:
        """Euclidean norm of all gradients together."""
        return float(torch.nn.utils.get_total_norm(list(self.gradients.values())))


def plain_model(config: ModelConfig, *, seed: int, drop_path: Sequence[float] = ()) -> VisionTransformer:
    """The model in float32 on the CPU with the weights every run of this seed starts from; nothing is recomputed."""
    model = VisionTransformer(config, drop_path=drop_path)
    initialise(model, seed=seed)
    return model.train()


def mean_gradients(
    model: nn.Module, loss: Loss, *, micro_batches: int, seed_micro_batch: Callable[[int], None] | None = None
) -> Gradients:
    """Gradients of the mean loss over micro-batches 0 .. n - 1, accumulated in this order; they also stay in `p.grad`.

    `seed_micro_batch` is called with the number of each micro-batch before its forward pass. A parameter that no loss
    reaches has a gradient of zeros.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for parameter in parameters.values():
        parameter.grad = None
    losses = []
    for k in range(micro_batches):
        if seed_micro_batch is not None:
            seed_micro_batch(k)
        value = loss(model, k)
        (value / micro_batches).backward()
        losses.append(value.item())
    for parameter in parameters.values():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return Gradients(losses=losses, gradients={name: p.grad.float() for name, p in parameters.items() if p.grad is not None})


def train_plainly(
    model: nn.Module,
    loss: StepLoss,
    *,
    steps: int,
    micro_batches: int,
    optimizer: torch.optim.Optimizer,
    clip: float = 0.0,
    lr_at_step: Callable[[int], float] | None = None,
    seed_micro_batch: Callable[[int, int], None] | None = None,
) -> list[Gradients]:
    """Optimizer steps 0 .. steps - 1 on `model` in place; what each step's gradients were before clipping.

    clip: largest global norm, 0 for none. lr_at_step: rate of every parameter group; None leaves them as they are.
    seed_micro_batch: called with (step, micro-batch) before each forward pass.
    """
    taken = []
    for step in range(steps):
        if lr_at_step is not None:
            for group in optimizer.param_groups:
                group["lr"] = lr_at_step(step)

        def loss_of_step(forward: Forward, k: int, step: int = step) -> Tensor:
            return loss(forward, step, k)

        def seed_of_step(k: int, step: int = step) -> None:
            if seed_micro_batch is not None:
                seed_micro_batch(step, k)

        found = mean_gradients(model, loss_of_step, micro_batches=micro_batches, seed_micro_batch=seed_of_step)
        taken.append(Gradients(losses=found.losses, gradients={n: g.clone() for n, g in found.gradients.items()}))
        if clip > 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return taken
