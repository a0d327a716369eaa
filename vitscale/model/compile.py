"""torch.compile block by block: every block runs the same code, so it is compiled once and starts in seconds."""

from collections.abc import Callable

import torch

from vitscale.model.layers import Block
from vitscale.model.position import rotation
from vitscale.model.vit import VisionTransformer


def compile_blocks(model: VisionTransformer, *, batch: int, dtype: torch.dtype, say: Callable[[str], None]) -> bool:
    """Compile every block in place, or none and say why, and return which. Names, hooks and values of weights stay.

    One block is tried first on a batch of zeros, forwards and backwards, in the type of the run.
    """
    config = model.config
    device = next(model.parameters()).device
    trial = Block(config, model.dropout.rate).to(device, dtype)
    trial.compile()
    turned = rotation(config, config.grid, config.grid, device) if config.position == "rotary" else None
    z_BND = torch.zeros(batch, config.tokens, config.width, device=device, dtype=dtype, requires_grad=True)
    try:
        trial(z_BND, turned, None).sum().backward()
    except Exception as error:  # whatever a compiler chain may raise; without it the run is slower, not wrong
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        say(f"blocks are not compiled, because torch.compile failed here ({reason}); the run goes on without it")
        torch.compiler.reset()
        return False
    for block in model.blocks:
        block.compile()
    return True


def forget_compiled() -> None:
    """Let the next model be compiled as the first was: having met two batch sizes, torch compiles for any, which is slower."""
    torch.compiler.reset()
