"""The plain loop of cifar_against_timm: timm's model, its reader of WebDataset shards, its augmentation, torch's AdamW.

    python -m tests.measure.plain_timm TRAIN_SHARDS TEST_SHARDS SECONDS OUT.json

The settings of our cifar10 recipe (sizes, batch, rate, warm-up, cosine, decay, crop), but for what is timm's own: learned
positions, initialisation, PIL decoding and resizing; float32, since a strided convolution in bf16 takes 20 times as long on a
CPU without it. The rate follows the time, so that it ends at 0 when the seconds do.
"""

import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.loader import eval_stream
from data_pipeline.manifest import read_manifest
from launch.peers import mend_torchvision, timm_model
from vitscale.model.vit import decays
from vitscale.recipes.catalog import recipe_named

STALL_S = 2.0
"""A longer pause between two steps is one in which this process was stopped."""


def main() -> None:
    train, test, seconds, out = sys.argv[1], sys.argv[2], float(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(2)
    torch.manual_seed(0)
    config = recipe_named("cifar10")
    model = timm_model(config.model)
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if decays(n, p)], "weight_decay": config.optim.weight_decay},
        {"params": [p for n, p in named.items() if not decays(n, p)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.optim.peak_lr, fused=True)
    used_s, images_seen, last_s = 0.0, 0, time.monotonic()
    model.train()
    for images_BCHW, labels_B in batches(train, config.augment, config.optim.global_batch):
        now_s = time.monotonic()
        used_s += min(now_s - last_s, STALL_S)
        last_s = now_s
        if used_s >= seconds:
            break
        share = used_s / seconds
        for group in optimizer.param_groups:
            group["lr"] = config.optim.peak_lr * (share / 0.05 if share < 0.05 else 0.5 * (1 + math.cos(math.pi * share)))
        F.cross_entropy(model(images_BCHW.float() / 127.5 - 1), labels_B).backward()
        torch.nn.utils.clip_grad_norm_(named.values(), config.optim.clip)
        optimizer.step()
        optimizer.zero_grad()
        images_seen += len(labels_B)
    out.write_text(json.dumps({"top1": score(model, test), "images": images_seen, "seconds": used_s}))
    os._exit(0)  # timm's persistent workers would be waited for


def batches(shards: str, augment: AugmentConfig, batch: int):
    """timm's loader without its prefetcher, for ever: uint8 images and labels."""
    mend_torchvision()
    from timm.data import create_dataset, create_loader

    dataset = create_dataset("wds/", root=shards, split="train", is_training=True, batch_size=batch, seed=0, repeats=1000)
    loader = create_loader(
        dataset,
        input_size=32,
        batch_size=batch,
        is_training=True,
        scale=(augment.crop_area_min, augment.crop_area_max),
        ratio=(1 / augment.crop_ratio_max, augment.crop_ratio_max),
        hflip=augment.flip,
        color_jitter=0.0,
        interpolation="bicubic",
        num_workers=1,
        use_prefetcher=True,
        device=torch.device("cpu"),
        persistent_workers=True,
    )
    while True:
        yield from loader.loader


@torch.no_grad()
def score(model: torch.nn.Module, shards: str) -> float:
    """Top-1 on every image of the test set."""
    model.eval()
    stream = eval_stream(
        read_manifest(Path(shards)),
        data=DataConfig(workers=0),
        augment=AugmentConfig(eval_crop=1.0),
        image_size=32,
        micro_batch=100,
        rank=0,
        world=1,
    )
    right = total = 0
    for batch in stream:
        images_BCHW = batch.images_BHWC.permute(0, 3, 1, 2).float() / 127.5 - 1
        hits_B = (model(images_BCHW).argmax(1) == batch.labels_B) & batch.counted_B
        right, total = right + int(hits_B.sum()), total + int(batch.counted_B.sum())
    return right / total


if __name__ == "__main__":
    main()
