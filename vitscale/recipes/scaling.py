"""Scaling Vision Transformers: g/14 and its relatives on JFT, with attention pooling and a schedule that can go on for ever.

All of them have AdamW where the sources have Adafactor, which factors the second moment over rows and columns. What changes
with it: Adafactor's beta2 = min(0.999, 1 - t^-0.8) grows with the step (beta2_cap=0.999 in big_vision), ours is 0.999 from the
first one with AdamW's own correction; the second moment costs four bytes a number instead of next to nothing; and its clipping
of updates is off in big_vision, so nothing stands for it here.

Common to all of them
Converted  decay as lr * 0.03 for the body and 100 times that for the head (Zhai et al. 2022, section 3.1: better few-shot
           transfer), which in our convention is 0.03 and 3.0.
Differs    JFT is not public; the sources resize without antialiasing.
"""

from data_pipeline.config import DataConfig
from vitscale.config import Config, OptimConfig, RunConfig, TrainConfig
from vitscale.model.config import ModelConfig
from vitscale.model.presets import preset

JFT_3B_CLASSES = 29_593


def scaling_g() -> Config:
    """AdamW where the source has Adafactor (beta2 rising to 0.999): ViT-g/14 on JFT-3B, one million steps.

    Source:    Zhai et al. 2022, arXiv 2106.04560; big_vision configs/proj/scaling_laws/train_vit_g.py
    Command:   deepspeed launch/pretrain.py --recipe scaling_g --data DIR --eval-data DIR
    Hardware:  of the source: TPUv3, 32 images per core, so 512 cores
    Numbers:   Adafactor with bf16 first moment, batch 16,384, rate 8e-4 rsqrt (timescale 10,000), warm-up 10,000, cool-down
               50,000 steps, decay 0.03 (head 3.0), clipping 1, attention pooling, sigmoid with head biases of -10, crop and
               flip only
    Converted: one million steps of 16,384 are 5.5 epochs of 3 billion images
    Differs:   what the head of this file says
    Published: of G/14 by the same recipe and more steps: 90.45 % on ImageNet fine-tuned, 84.86 % with 10 images per class
    Reached:   not run by us
    """
    return _jft("scaling_g", "g/14", length=1_000_000, cooldown=50_000, micro_batch_max=32)


def sovit_400m() -> Config:
    """AdamW where the source has Adafactor (beta2 rising to 0.999): SoViT-400m/14 on JFT-3B, 40 billion images.

    Source:    Alabdulmohsin et al. 2023, arXiv 2305.13035; shape in big_vision models/vit.py
    Command:   deepspeed launch/pretrain.py --recipe sovit_400m --data DIR --eval-data DIR
    Hardware:  of the source: TPU, hours not given here
    Numbers:   width 1,152, depth 27, feed-forward 4,304, 16 heads, attention pooling, 40 billion images
    Converted: batch, rates, decay and schedule are those of ViT-g/14 (Zhai et al. 2022), under which the source compares
               itself; we have not seen its own table; 40 billion images in batches of 16,384 are 2,441,407 steps
    Differs:   what the head of this file says
    Published: 90.3 % on ImageNet, fine-tuned at 518 pixels
    Reached:   not run by us
    """
    return _jft("sovit_400m", "So400m/14", length="40000000000img", cooldown=50_000, micro_batch_max=64)


def vit_22b() -> Config:
    """AdamW where the source has a relative of Adafactor (beta2 rising to 0.999): ViT-22B on JFT-4B, 177,000 steps.

    Source:    Dehghani et al. 2023, arXiv 2302.05442, section 4.1 and table 1
    Command:   deepspeed launch/pretrain.py --recipe vit_22b --data DIR --eval-data DIR ds.zero_optimization.stage=3
    Hardware:  of the source: 1,024 TPUv4, 1,150 tokens per second and chip, 54.9 % MFU
    Numbers:   batch 65,536, rate 1e-3 rsqrt, warm-up 10,000, cool-down 30,000 steps, decay 0.03 (head 3.0), sigmoid, crop and
               flip
    Converted: 177,000 steps of 65,536 are 2.9 epochs of 4 billion images; timescale 10,000, clipping 1 and head biases of -10
               are taken from Zhai et al. 2022; 29,593 classes are those of JFT-3B (the source: about 30,000)
    Differs:   the source shards each layer over chips, ZeRO its state
    Published: 89.5 % on ImageNet by a linear probe
    Reached:   not run by us
    """
    return _jft("vit_22b", "22B/14", length=177_000, cooldown=30_000, micro_batch_max=16, global_batch=65_536, peak_lr=1e-3)


def _jft(
    name: str,
    size: str,
    *,
    length: int | str,
    cooldown: int,
    micro_batch_max: int,
    global_batch: int = 16_384,
    peak_lr: float = 8e-4,
) -> Config:
    return Config(
        recipe=name,
        model=ModelConfig(
            image_size=224, classes=JFT_3B_CLASSES, activation="gelu_tanh", class_token=False, pool="map", **preset(size)
        ),
        optim=OptimConfig(
            global_batch=global_batch,
            micro_batch_max=micro_batch_max,
            peak_lr=peak_lr,
            schedule="rsqrt",
            warmup=10_000,
            timescale=10_000,
            cooldown=cooldown,
            weight_decay=0.03,
            head_weight_decay=3.0,
            moment_dtype="bf16",
            clip=1.0,
        ),
        train=TrainConfig(length=length, objective="sigmoid", head_bias=-10.0),
        data=DataConfig(workers=12),
        run=RunConfig(save_every=1000, keep_every=10_000),
    )
