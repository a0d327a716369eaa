"""Pretrain a Vision Transformer: `deepspeed launch/pretrain.py`; without arguments the embedded digits, in minutes."""

from launch.command import run_training, training_parser
from vitscale.base.errors import run_main


def main() -> None:
    parser = training_parser("Pretrain a Vision Transformer. The same command again resumes the run.")
    run_training(parser.parse_intermixed_args(), default_recipe="digits")


if __name__ == "__main__":
    run_main(main)
