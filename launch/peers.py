"""Loaders of others over the same shards, each as its documentation sets it up.

Equal terms: random resized crop of the same size and areas, bicubic with antialiasing, flip 0.5, the same number of
worker processes, which stay alive; collation in the workers where the library offers it; nothing pinned.

timm, webdataset          uint8 out, as ours: timm's loader is taken before its prefetcher, and torchvision's transform ends
                          with PILToTensor. That saves both the conversion to floats, which their documentation has.
timm-float,               as documented, normalised floats out: timm's prefetcher converts in the main process,
webdataset-float          torchvision's ToTensor and Normalize in the workers. Ours leaves that to the device.
"""

from collections.abc import Callable, Generator
from functools import partial
from typing import Any

import torch

from data_pipeline.config import AugmentConfig
from data_pipeline.manifest import Manifest
from vitscale.base.errors import EnvironmentFault

_SHUFFLED = 1000
"""Samples in the shuffle buffers: small, so that filling them costs no loader its start."""


def timm_batches(
    manifest: Manifest, *, augment: AugmentConfig, image_size: int, batch: int, workers: int, is_float: bool = False
) -> Generator[Any]:
    """timm's reader for WebDataset shards, its transform and its collation. Raises EnvironmentFault where it is missing."""
    mend_torchvision()
    try:
        from timm.data import create_dataset, create_loader  # an extra that only this comparison needs
    except ImportError as error:
        raise _missing("timm", error) from None
    dataset = create_dataset(
        "wds/", root=manifest.tars_at, split="train", is_training=True, batch_size=batch, seed=0, repeats=1_000_000
    )
    loader = create_loader(
        dataset,
        input_size=image_size,
        batch_size=batch,
        is_training=True,
        scale=(augment.crop_area_min, augment.crop_area_max),
        ratio=(1 / augment.crop_ratio_max, augment.crop_ratio_max),
        hflip=augment.flip,
        color_jitter=0.0,
        interpolation="bicubic",
        num_workers=workers,
        device=torch.device("cpu"),
        persistent_workers=True,
    )
    while True:
        for images_BCHW, _ in loader if is_float else loader.loader:
            yield images_BCHW


def webdataset_batches(
    manifest: Manifest, *, augment: AugmentConfig, image_size: int, batch: int, workers: int, is_float: bool = False
) -> Generator[Any]:
    """webdataset's pipeline with torchvision's transforms. Raises EnvironmentFault where one is missing."""
    mend_torchvision()
    try:
        import webdataset  # extras that only this comparison needs
        from torchvision import transforms
    except ImportError as error:
        raise _missing("torchvision", error) from None
    view = transforms.Compose(
        [
            transforms.RandomResizedCrop(
                image_size,
                scale=(augment.crop_area_min, augment.crop_area_max),
                ratio=(1 / augment.crop_ratio_max, augment.crop_ratio_max),
                interpolation=transforms.InterpolationMode.BICUBIC,
            ),
            transforms.RandomHorizontalFlip(augment.flip),
            *(
                [transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)]
                if is_float
                else [transforms.PILToTensor()]
            ),
        ]
    )
    urls = [f"{manifest.tars_at}/{shard.name}.tar" for shard in manifest.shards]
    dataset = (
        webdataset.WebDataset(urls, resampled=True, shardshuffle=False)
        .shuffle(_SHUFFLED)
        .decode("pil")
        .to_tuple("jpg;png;webp", "cls")
        .map_tuple(view, lambda label: label)
        .batched(batch, collation_fn=_stack)
    )
    for images_BCHW, _ in webdataset.WebLoader(dataset, batch_size=None, num_workers=workers, persistent_workers=True):
        yield images_BCHW


def _stack(samples: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([image for image, _ in samples]), torch.tensor([label for _, label in samples])


def mend_torchvision() -> None:
    """torchvision's CUDA build, the only one in the registry, wants two operators that a CPU build of torch lacks."""
    if not torch.backends.cuda.is_built() and not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)


_kept: list[torch.library.Library] = []  # an operator lives as long as its library


def _missing(name: str, error: ImportError) -> EnvironmentFault:
    return EnvironmentFault(f"--peers {name} cannot be imported ({error}); install it with `pip install -e '.[peers]'`")


PEERS: dict[str, Callable[..., Generator[Any]]] = {
    "timm": timm_batches,
    "timm-float": partial(timm_batches, is_float=True),
    "webdataset": webdataset_batches,
    "webdataset-float": partial(webdataset_batches, is_float=True),
}
"""Loaders by the name of `--peers`."""
