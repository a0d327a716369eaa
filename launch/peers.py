"""Loaders of others over the same shards, each as its documentation sets it up; models and training loops of others.

Equal terms of loaders: random resized crop of the same size and areas, bicubic with antialiasing, flip 0.5, the same number of
worker processes, which stay alive; collation in the workers where the library offers it; nothing pinned.

timm, webdataset          uint8 out, as ours: timm's loader is taken before its prefetcher, and torchvision's transform ends
                          with PILToTensor. That saves both the conversion to floats, which their documentation has.
timm-float,               as documented, normalised floats out: timm's prefetcher converts in the main process,
webdataset-float          torchvision's ToTensor and Normalize in the workers. Ours leaves that to the device.
"""

from collections.abc import Callable, Generator
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from data_pipeline.config import AugmentConfig
from data_pipeline.manifest import Manifest
from vitscale.base.errors import EnvironmentFault
from vitscale.config import Config
from vitscale.ds_config import DsConfig
from vitscale.model.config import ModelConfig
from vitscale.model.layers import normalise_pixels

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


_TIMM_POOLS: dict[str, Literal["token", "avg", "map"]] = {"class": "token", "average": "avg", "map": "map"}


# ---- models and loops -----------------------------------------------------------------------------------------------


def timm_model(model: ModelConfig) -> nn.Module:
    """timm's Vision Transformer of the same sizes, with its own initialisation. Raises EnvironmentFault where timm is missing.

    What differs between variants of ours beyond the sizes is left at timm's defaults: a comparison of speed.
    """
    mend_torchvision()
    try:
        from timm.models.vision_transformer import VisionTransformer
    except ImportError as error:
        raise _missing("timm", error) from None
    return VisionTransformer(
        img_size=model.image_size,
        patch_size=model.patch_size,
        in_chans=model.channels,
        num_classes=model.classes,
        embed_dim=model.width,
        depth=model.depth,
        num_heads=model.heads,
        mlp_ratio=model.feedforward_width / model.width,
        class_token=model.class_token,
        global_pool=_TIMM_POOLS[model.pool],
        init_values=model.layer_scale,
        qk_norm=model.qk_norm,
    )


def deepspeed_step(
    model: nn.Module, *, config: Config, ds: DsConfig, device: torch.device
) -> Callable[[torch.Tensor, torch.Tensor], float]:
    """One step of the script that DeepSpeed's documentation teaches: images_BHWC (uint8), labels_B to the last loss."""
    import deepspeed  # the training engine of a script of others; ours is in vitscale.training.engine

    is_bf16 = config.train.precision == "bf16"
    optim = config.optim
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=optim.peak_lr, weight_decay=optim.weight_decay, fused=True),
        config={
            "train_micro_batch_size_per_gpu": ds.micro_batch,
            "gradient_accumulation_steps": ds.accumulation,
            "gradient_clipping": optim.clip,
            "bf16": {"enabled": is_bf16},
            "zero_optimization": {"stage": 1},
        },
        dist_init_required=False,
    )
    dtype = torch.bfloat16 if is_bf16 else torch.float32

    def step(images_BHWC: torch.Tensor, labels_B: torch.Tensor) -> float:
        for _ in range(ds.accumulation):
            images = images_BHWC.to(device, non_blocking=True)
            images_BCHW = normalise_pixels(images, config.model.pixel_mean, config.model.pixel_std, dtype)
            loss = F.cross_entropy(engine(images_BCHW).float(), labels_B.to(device, non_blocking=True))
            engine.backward(loss)
            engine.step()
        return float(loss.item())

    return step


def _missing(name: str, error: ImportError) -> EnvironmentFault:
    return EnvironmentFault(f"--peers {name} cannot be imported ({error}); install it with `pip install -e '.[peers]'`")


PEERS: dict[str, Callable[..., Generator[Any]]] = {
    "timm": timm_batches,
    "timm-float": partial(timm_batches, is_float=True),
    "webdataset": webdataset_batches,
    "webdataset-float": partial(webdataset_batches, is_float=True),
}
"""Loaders by the name of `--peers`."""
