"""Export trained weights to one file that holds all it takes to use them, and prove it by loading them again."""

from pathlib import Path

import torch

from launch.arguments import Parser
from launch.trained import load_weights_of
from vitscale.base.errors import EnvironmentFault, UsageError, run_main
from vitscale.base.files import sha256_file
from vitscale.model.flops import parameters
from vitscale.model.vit import VisionTransformer
from vitscale.weights.native import Weights, load_weights, save_weights

CERTIFICATE_IMAGES = 8


def main() -> None:
    parser = Parser(description="Export the weights of a run to one file.")
    parser.add_argument(
        "--from", dest="source", required=True, metavar="RUN[@STEP]", help="run to export; default: newest step"
    )
    parser.add_argument("--to", type=Path, required=True, metavar="FILE", help="file to write, ending in .safetensors")
    parser.add_argument("--format", choices=["safetensors"], default="safetensors")
    args = parser.parse_args()
    if args.to.suffix != ".safetensors":
        raise UsageError(f"expected --to with a name ending in .safetensors, got {args.to}")
    weights = load_weights_of(args.source)
    args.to.parent.mkdir(parents=True, exist_ok=True)
    save_weights(args.to, weights)
    difference = (fixed_logits(weights) - fixed_logits(load_weights(args.to))).abs().max().item()
    if difference != 0:
        raise EnvironmentFault(
            f"{args.to} gives other logits than {args.source} (largest difference {difference}); do not use it"
        )
    print(
        f"{args.to}: step {weights.meta['step']} of {weights.meta['source']}, {parameters(weights.model):,} parameters, "
        f"sha256 {sha256_file(args.to)}\n"
        f"certificate: loaded again; logits of {CERTIFICATE_IMAGES} fixed images differ by at most {difference}"
    )


@torch.no_grad()
def fixed_logits(weights: Weights) -> torch.Tensor:
    """Logits of the model for a batch of seeded noise, in float32."""
    model = VisionTransformer(weights.model)
    model.load_state_dict(weights.tensors)
    generator = torch.Generator().manual_seed(0)
    size = weights.model.image_size
    images_BCHW = torch.randn(CERTIFICATE_IMAGES, weights.model.channels, size, size, generator=generator)
    return model.eval()(images_BCHW)


if __name__ == "__main__":
    run_main(main)
