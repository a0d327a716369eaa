"""Fine-tune what was pretrained: new head, other resolution, small labelled set. `deepspeed launch/finetune.py --from RUN`."""

import dataclasses

from vitscale.base.errors import UsageError, run_main
from vitscale.base.startup import importing

with importing():
    from data_pipeline.config import DataConfig, sources_of
    from data_pipeline.remote import open_dataset
    from launch.command import run_training, training_parser
    from launch.trained import load_weights_of
    from vitscale.config import Config


def main() -> None:
    parser = training_parser("Fine-tune pretrained weights with a new head; the same command again resumes the run.")
    parser.add_argument(
        "--from",
        dest="source",
        required=True,
        metavar="RUN|WEIGHTS",
        help="RUN, RUN@STEP, .safetensors, .npz, or a directory of timm or Hugging Face",
    )
    args = parser.parse_intermixed_args()

    def adapt(config: Config) -> Config:
        """The pretrained model at its own resolution, with a head for the classes of the new dataset."""
        if args.data is None:
            raise UsageError("fine-tuning needs a training dataset; add --data DIR (launch/build_shards.py makes one)")
        try:
            first, *_ = sources_of(args.data)  # all have the same classes, or open_datasets refuses them
        except ValueError as error:
            raise UsageError(f"--data: {error}") from None
        classes = len(open_dataset(first.path, cache_dir=DataConfig().cache_path).classes)
        return dataclasses.replace(
            config,
            model=dataclasses.replace(load_weights_of(args.source).model, classes=classes),
        )

    run_training(args, default_recipe="finetune", adapt=adapt, source=args.source)


if __name__ == "__main__":
    run_main(main)
