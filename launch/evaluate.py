"""Score trained weights on a dataset, every image exactly once on any number of ranks. Accelerate joins the ranks."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator, init_empty_weights

from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.loader import eval_stream
from data_pipeline.remote import open_dataset
from data_pipeline.storage import check_files
from launch.arguments import Parser
from launch.datasets import require_fit
from launch.trained import EMA_HELP, load_weights_of
from vitscale.base.cluster import resolve_cluster
from vitscale.base.errors import UsageError, run_main
from vitscale.base.files import write_json
from vitscale.evaluation.classification import classify
from vitscale.model.vit import VisionTransformer
from vitscale.training.objective import Objective


def main() -> None:
    parser = Parser(description="Score trained weights: top-1, top-5 and loss over a whole dataset.")
    parser.add_argument(
        "--from", dest="source", required=True, metavar="RUN|WEIGHTS", help="RUN, RUN@STEP or a .safetensors file"
    )
    parser.add_argument("--ema", nargs="?", const="", metavar="DECAY", help=EMA_HELP)
    parser.add_argument("--data", required=True, metavar="DIR|URL", help="dataset, made by launch/build_shards.py")
    parser.add_argument("--task", choices=["classify"], default="classify")
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="images one rank feeds forward at once")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the scores there as well")
    parser.add_argument("--local_rank", type=int, help="set by launchers; ignored")
    args = parser.parse_args()
    if args.batch < 1:
        raise UsageError(f"--batch must be at least 1, got {args.batch}")
    cluster = resolve_cluster(os.environ)
    data = DataConfig(workers=0)
    manifest = open_dataset(args.data, cache_dir=data.cache_path)
    check_files(manifest, local_rank=cluster.local_rank, local_world=cluster.local_world)
    weights = load_weights_of(args.source, ema=args.ema)
    if len(manifest.classes) != weights.model.classes:
        raise UsageError(
            f"{args.source} tells {weights.model.classes} classes apart but {args.data} has {len(manifest.classes)}; "
            "name the dataset the weights were trained for"
        )
    require_fit(manifest, classes=weights.model.classes)

    os.environ.update(cluster.environment())
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.set_num_threads(cluster.threads())
    with init_empty_weights():
        model = VisionTransformer(weights.model)
    model.load_state_dict(weights.tensors, assign=True)
    model.to(accelerator.device).eval()
    objective = Objective(
        model=weights.model,
        label_smoothing=0.0,
        device=accelerator.device,
        dtype=torch.float32,
        kind="sigmoid" if weights.meta.get("objective") == "sigmoid" else "softmax",
        masked_classes=weights.masked_classes,
    )

    def sum_over_ranks(values: Sequence[float]) -> list[float]:
        totals = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
        return accelerator.reduce(totals, "sum").tolist()

    scores = classify(
        objective,
        model,
        eval_stream(
            manifest,
            data=data,
            augment=AugmentConfig(eval_crop=weights.eval_crop),
            image_size=weights.model.image_size,
            micro_batch=args.batch,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
        ),
        sum_over_ranks=sum_over_ranks,
    )
    if accelerator.is_main_process:
        record = {"source": args.source, "dataset": str(args.data), "fingerprint": manifest.fingerprint, **scores.as_record()}
        if "ema" in weights.meta:
            record["ema"] = float(weights.meta["ema"])
        of = f"moving average {weights.meta['ema']} of " if "ema" in weights.meta else ""
        print(
            f"{of}{args.source} on {args.data}: top-1 {scores.top1:.2%}, top-5 {scores.top5:.2%}, loss {scores.loss:.4f}, "
            f"{scores.images} images"
        )
        if args.json is not None:
            write_json(args.json, record)
    accelerator.end_training()


if __name__ == "__main__":
    run_main(main)
