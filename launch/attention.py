"""Show what a model looks at: DIR/index.html, one page that needs nothing else, and pictures for print.

    python launch/attention.py --from RUN|WEIGHTS --images PATH... --out DIR

index.html               every layer and head, rollouts, what each patch attends to, curves over depth, parameters
attention.png            a row per image: last layer, rollout, gradient rollout, each head; attention-NN-NAME.png: one alone
heads-NN-NAME.png        all layers (from top to bottom) and heads of one image
depth.png                attention distance, entropy and token norms over depth
A directory given to --images stands for its first 16 images by name. docs/attention.md says what each picture means.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from data_pipeline.augment import eval_view
from data_pipeline.config import AugmentConfig
from data_pipeline.decode import BadImage, decode
from launch.arguments import Parser
from launch.trained import load_weights_of
from vitscale.base.errors import EnvironmentFault, UsageError, run_main
from vitscale.base.progress import progress
from vitscale.insight.figures import draw_attention, save_figure
from vitscale.insight.page import PICTURE_SIDE_MAX, write_page
from vitscale.insight.plots import draw_depth, draw_heads
from vitscale.insight.views import ImageView, view_image, view_model
from vitscale.model.layers import normalise_pixels
from vitscale.model.vit import VisionTransformer
from vitscale.weights.native import Weights

IMAGES_OF_A_DIRECTORY = 16
ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(description=str(__doc__))
    parser.add_argument("--from", dest="source", required=True, metavar="RUN|WEIGHTS")
    parser.add_argument("--images", required=True, nargs="+", type=Path, metavar="PATH")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    given = parser.parse_args(arguments)

    paths = image_paths(given.images)
    weights = load_weights_of(given.source)
    model = VisionTransformer(weights.model).eval()
    model.load_state_dict(weights.tensors)
    model.requires_grad_(False)
    views = [view_of(model, weights, path) for path in progress(paths, total=len(paths), what="attention", unit="img")]
    out = given.out
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentFault(f"expected a directory to write to at --out {out}, got {error}; name another one") from None
    described = view_model(model, description_of(weights, given.source))
    draw_attention(out / "attention.png", [view.row for view in views])
    for number, view in enumerate(views):
        name = f"{number:02d}-{Path(view.name).stem}.png"
        if len(views) > 1:
            draw_attention(out / f"attention-{name}", [view.row])
        save_figure(out / f"heads-{name}", draw_heads(view, described))
    save_figure(out / "depth.png", draw_depth(views, described))
    write_page(out / "index.html", views, described)
    print(f"{len(views)} images: {out / 'index.html'} and pictures beside it")


def description_of(weights: Weights, source: str) -> str:
    """One line about the model, for the page."""
    model = weights.model
    return (
        f"{source}: ViT of width {model.width}, {model.depth} layers, {model.heads} heads, patches of {model.patch_size} px "
        f"on {model.image_size}; {model.norm}-norm, pooling {model.pool}, tokens before the patches: {model.prefix_tokens}"
    )


def image_paths(given: Sequence[Path]) -> list[Path]:
    """Files as they are, directories as their first images by name. Raises UsageError when there is nothing to show."""
    paths = []
    for path in given:
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix.lower() in ENDINGS)
            if not found:
                raise UsageError(
                    f"expected images ({', '.join(ENDINGS)}) in the directory {path}, found none; name image files"
                )
            paths += found[:IMAGES_OF_A_DIRECTORY]
        elif path.is_file():
            paths.append(path)
        else:
            raise UsageError(f"expected an image or a directory of images at {path}, found none; check --images")
    return paths


def view_of(model: VisionTransformer, weights: Weights, path: Path) -> ImageView:
    """Everything shown of one image: what evaluation sees of it, drawn at a higher resolution where the file has it."""
    config = weights.model
    view_HWC = read_view(path, weights, config.image_size)
    sharp = max(1, PICTURE_SIDE_MAX // config.image_size) * config.image_size
    images_BHWC_u8 = torch.from_numpy(np.ascontiguousarray(view_HWC))[None]
    images_BCHW = normalise_pixels(images_BHWC_u8, config.pixel_mean, config.pixel_std, torch.float32)

    def caption(label: int, probability: float) -> str:
        return f"{100 * probability:.0f} %  {weights.classes[label]}" if weights.classes else path.name

    return view_image(model, images_BCHW, read_view(path, weights, sharp), name=path.name, caption=caption)


def read_view(path: Path, weights: Weights, image_size: int) -> np.ndarray:
    """The image as evaluation sees it, at any size: image_size,image_size,3 of uint8."""
    try:
        augment = AugmentConfig(eval_crop=weights.eval_crop)
        return eval_view(decode(path.read_bytes()), augment=augment, image_size=image_size)
    except (BadImage, OSError) as error:
        raise EnvironmentFault(f"{path} cannot be read as an image ({error}); name another file") from None


if __name__ == "__main__":
    run_main(main)
