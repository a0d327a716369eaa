"""Export trained weights to one file that holds all it takes to use them, and prove it by loading them again."""

from pathlib import Path

from launch.arguments import Parser
from launch.certificate import IMAGES, our_logits, sentence
from launch.trained import EMA_HELP, load_weights_of
from vitscale.base.errors import EnvironmentFault, UsageError, run_main
from vitscale.model.flops import parameters
from vitscale.weights.foreign import identity_of_foreign, load_any, save_directory, save_npz
from vitscale.weights.huggingface import preprocessor, to_huggingface
from vitscale.weights.jax import to_jax
from vitscale.weights.mapping import Foreign, grouped
from vitscale.weights.native import Weights, save_weights
from vitscale.weights.timm import to_timm


def main() -> None:
    parser = Parser(description="Export the weights of a run, or of a file, for us or for another library.")
    parser.add_argument(
        "--from", dest="source", required=True, metavar="RUN[@STEP]", help="run or weights to export; default: newest step"
    )
    parser.add_argument(
        "--to", type=Path, required=True, metavar="PATH", help="file to write (.safetensors, .npz), else a new directory"
    )
    parser.add_argument("--ema", nargs="?", const="", metavar="DECAY", help=EMA_HELP)
    parser.add_argument("--format", choices=["safetensors", "timm", "huggingface", "npz"], default="safetensors")
    parser.add_argument("--scheme", help="npz: big_vision (default) or vision_transformer; huggingface: current or older")
    args = parser.parse_args()
    check_scheme(args.format, args.scheme)
    suffix = {"safetensors": ".safetensors", "npz": ".npz"}.get(args.format)
    if suffix is not None and args.to.suffix != suffix:
        raise UsageError(f"expected --to with a name ending in {suffix}, got {args.to}")
    if suffix is None and args.to.suffix in (".safetensors", ".npz"):
        raise UsageError(f"expected --to with the name of a new directory for --format {args.format}, got {args.to}")
    weights = load_weights_of(args.source, ema=args.ema)
    args.to.parent.mkdir(parents=True, exist_ok=True)
    foreign = write(args.to, weights, args.format, args.scheme)
    difference = (our_logits(weights) - our_logits(load_any(args.to))).abs().max().item()
    # A fold adds numbers that were apart, so the last bits of a sum may differ; a copy may not.
    if difference > (1e-4 if foreign is not None and foreign.folds else 0):
        raise EnvironmentFault(
            f"{args.to} gives other logits than {args.source} (largest difference {difference}); do not use it"
        )
    step, source = weights.meta.get("step", "?"), weights.meta.get("source", args.source)
    what = f"moving average {weights.meta['ema']} at step" if "ema" in weights.meta else "step"
    identity = identity_of_foreign(args.to)
    print(f"{args.to}: {what} {step} of {source}, {parameters(weights.model):,} parameters, sha256 {identity}")
    if foreign is not None:
        print("\n".join([*grouped(foreign.rows), *(f"fold: {fold}" for fold in foreign.folds)]))
    print(f"certificate: loaded again; logits of {IMAGES} fixed images differ by at most {difference}")
    if foreign is not None:
        print(sentence(args.to, args.format, weights))


def check_scheme(format_name: str, scheme: str | None) -> None:
    known = {"npz": ("big_vision", "vision_transformer"), "huggingface": ("current", "older")}.get(format_name, ())
    if scheme is not None and scheme not in known:
        raise UsageError(f"expected --scheme {' or '.join(known) or 'absent'} for --format {format_name}, got {scheme}")


def write(path: Path, weights: Weights, format_name: str, scheme: str | None) -> Foreign | None:
    """Write the weights in the format; what was converted, or None for our own."""
    if format_name == "safetensors":
        save_weights(path, weights)
        return None
    if format_name == "timm":
        foreign = to_timm(weights)
        save_directory(path, foreign)
    elif format_name == "huggingface":
        foreign = to_huggingface(weights, naming=scheme or "current")
        save_directory(path, foreign, pixels=preprocessor(weights))
    else:
        prefix, scan = weights.meta.get("npz_prefix", ""), weights.meta.get("npz_scan") == "1"
        scheme = scheme or weights.meta.get("npz_scheme", "big_vision")
        foreign = to_jax(weights, scheme=scheme, prefix=prefix, scan=scan and scheme == "big_vision")
        save_npz(path, foreign.tensors)
    return foreign


if __name__ == "__main__":
    run_main(main)
