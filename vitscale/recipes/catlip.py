"""CatLIP: Mehta et al. 2024, arXiv 2404.15653: classification of the nouns of web captions, an open stand-in for JFT."""

from data_pipeline.config import AugmentConfig, DataConfig
from vitscale.config import Config, OptimConfig, RunConfig, TrainConfig
from vitscale.model.config import ModelConfig
from vitscale.model.presets import preset


def catlip_l16() -> Config:
    """ViT-L/16 on DataComp-1.3B, whose captions name 24,320 synsets of WordNet; several labels per image.

    Source:    Mehta et al. 2024; apple/corenet projects/catlip/pretraining/vit_large.yaml
    Command:   deepspeed launch/pretrain.py --recipe catlip_l16 --data DIR --eval-data DIR
    Hardware:  of the source: 128 A100 of 40 GB, with activation checkpointing
    Numbers:   AdamW 0.9/0.999, batch 65,536, rate 6e-4 cosine to 6e-6, warm-up 10,000 of 200,000 steps, decay 0.2, clipping 1,
               binary cross-entropy summed over classes, average of the weights with momentum 5e-4, crop and flip
    Converted: the momentum of the average 5e-4 is a decay of 0.9995; warm-up starts at 0 instead of 1e-6; our head starts at a
               bias of -10 as for JFT (Beyer et al. 2020)
    Differs:   the source has a stem of convolutions, batches of several resolutions (128 to 320 pixels with as many images as
               fit) and RangeAugment, which learns brightness, contrast and noise; here 224 pixels and none of these
    Published: 86.8 % on ImageNet fine-tuned at 224 pixels, 88.6 % at 512 (from the averaged weights)
    Reached:   not run by us
    """
    return Config(
        recipe="catlip_l16",
        model=ModelConfig(image_size=224, classes=24_320, **preset("L/16")),
        optim=OptimConfig(
            global_batch=65_536,
            micro_batch_max=128,
            peak_lr=6e-4,
            warmup=10_000,
            end_lr=6e-6,
            weight_decay=0.2,
            clip=1.0,
        ),
        train=TrainConfig(length=200_000, objective="sigmoid", head_bias=-10.0, ema=(0.9995,)),
        data=DataConfig(workers=12),
        augment=AugmentConfig(crop_area_min=0.08),
        run=RunConfig(save_every=5000),
    )
