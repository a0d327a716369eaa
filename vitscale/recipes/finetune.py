"""Fine-tuning recipes: a pretrained model gets a new head and, if asked, another resolution."""

from data_pipeline.config import AugmentConfig, DataConfig
from vitscale.config import Config, OptimConfig, RunConfig, TrainConfig
from vitscale.model.config import ModelConfig


def finetune() -> Config:
    """Short, gentle fine-tuning of any pretrained model on a small labelled set.

    Command:  deepspeed launch/finetune.py --from RUN --data DIR --eval-data DIR model.image_size=SIZE
    Hardware: any
    Source:   our own; AdamW where Dosovitskiy et al. 2021 (appendix B.1.1) fine-tune by SGD with momentum

    The model section is a stand-in: launch/finetune.py replaces it by the pretrained model's.
    """
    return Config(
        recipe="finetune",
        model=ModelConfig(image_size=224, patch_size=16, width=192, depth=12, heads=3, classes=1000),
        optim=OptimConfig(global_batch=48, micro_batch_max=48, peak_lr=5e-4, warmup="10%", weight_decay=0.05),
        train=TrainConfig(length="40ep", precision="fp32"),
        data=DataConfig(workers=0),
        augment=AugmentConfig(crop_area_min=0.6, crop_ratio_max=1.2, flip=0.0, eval_crop=1.0),
        run=RunConfig(log_every=1, eval_every="50%", save_every="50%"),
    )
