"""Fine-tune what was pretrained: new head, other resolution, small labelled set. `deepspeed launch/finetune.py --from RUN`."""

import dataclasses
from functools import cache
from pathlib import Path

from data_pipeline.manifest import read_manifest
from launch.assemble import identity_of, load_weights_of
from launch.command import run_training, training_parser
from vitscale.base.errors import UsageError, run_main
from vitscale.config import Config


def main() -> None:
    parser = training_parser("Fine-tune pretrained weights with a new head; the same command again resumes the run.")
    parser.add_argument(
        "--from", dest="source", required=True, metavar="RUN|WEIGHTS", help="RUN, RUN@STEP or a .safetensors file"
    )
    args = parser.parse_intermixed_args()
    weights = cache(lambda: load_weights_of(args.source))

    def adapt(config: Config) -> Config:
        """The pretrained model at its own resolution, with a head for the classes of the new dataset."""
        if args.data is None:
            raise UsageError("fine-tuning needs a training dataset; add --data DIR (launch/build_shards.py makes one)")
        classes = len(read_manifest(Path(args.data)).classes)
        return dataclasses.replace(
            config,
            model=dataclasses.replace(weights().model, classes=classes),
            train=dataclasses.replace(config.train, init_weights=args.source, init_sha256=identity_of(args.source)),
        )

    run_training(args, default_recipe="finetune", adapt=adapt, initial=weights)


if __name__ == "__main__":
    run_main(main)
