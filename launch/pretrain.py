"""Pretrain a Vision Transformer: `deepspeed launch/pretrain.py`; without arguments the embedded digits, in minutes."""

from vitscale.base.errors import run_main
from vitscale.base.startup import importing

with importing():
    from launch.command import run_training, training_parser


def main() -> None:
    parser = training_parser("Pretrain a Vision Transformer. The same command again resumes the run.")
    parser.add_argument("--from", dest="branch", metavar="RUN@STEP", help="branch off: a new run from that state")
    args = parser.parse_intermixed_args()
    run_training(args, default_recipe="digits", branch=args.branch)


if __name__ == "__main__":
    run_main(main)
