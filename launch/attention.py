"""Show what a model looks at: DIR/attention.png with a row per image, and DIR/attention-NN-NAME.png for each alone.

    python launch/attention.py --from RUN|WEIGHTS --images PATH... --out DIR

A row: the image as the model sees it, the attention of the class token in the last layer, rollout through all layers,
and each head of the last layer. A directory given to --images stands for its first 16 images by name.
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
from vitscale.insight.figures import AttentionRow, draw_attention
from vitscale.insight.look import look
from vitscale.insight.rollout import attention_rollout, gradient_rollout
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
    images = [read_view(path, weights) for path in paths]
    try:
        given.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentFault(
            f"expected a directory to write to at --out {given.out}, got {error}; name another one"
        ) from None
    rows = attention_rows(weights, images, names=[path.name for path in paths])
    draw_attention(given.out / "attention.png", rows)
    if len(rows) > 1:
        for number, (path, row) in enumerate(zip(paths, rows, strict=True)):
            draw_attention(given.out / f"attention-{number:02d}-{path.stem}.png", [row])
    print(f"{len(rows)} images: {given.out / 'attention.png'}")


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


def read_view(path: Path, weights: Weights) -> np.ndarray:
    """The image as evaluation sees it: image_size,image_size,3 of uint8."""
    try:
        augment = AugmentConfig(eval_crop=weights.eval_crop)
        return eval_view(decode(path.read_bytes()), augment=augment, image_size=weights.model.image_size)
    except (BadImage, OSError) as error:
        raise EnvironmentFault(f"{path} cannot be read as an image ({error}); name another file") from None


def attention_rows(weights: Weights, images: Sequence[np.ndarray], *, names: Sequence[str]) -> list[AttentionRow]:
    """What the figure shows of each image, computed one image at a time: the maps of all layers are large."""
    config = weights.model
    model = VisionTransformer(config).eval()
    model.load_state_dict(weights.tensors)
    rows = []
    for image_HWC, name in zip(progress(images, total=len(images), what="attention", unit="img"), names, strict=True):
        images_BHWC_u8 = torch.from_numpy(np.ascontiguousarray(image_HWC))[None]
        images_BCHW = normalise_pixels(images_BHWC_u8, config.pixel_mean, config.pixel_std, torch.float32)
        seen = look(model, images_BCHW)
        probability, label = torch.softmax(seen.logits_BC, dim=-1).max(dim=1)
        caption = name
        if weights.classes:
            caption = f"{100 * float(probability):.0f} %  {weights.classes[int(label)]}"
        rows.append(
            AttentionRow(
                image_HWC=image_HWC,
                caption=caption,
                heads_HN=seen.last_BHN[0].numpy(),
                rollout_N=attention_rollout(seen.start_BN, seen.mean_BNN)[0].numpy(),
                gradient_N=gradient_rollout(model, images_BCHW, label)[0].numpy(),
                grid=(seen.rows, seen.columns),
            )
        )
    return rows


if __name__ == "__main__":
    run_main(main)
