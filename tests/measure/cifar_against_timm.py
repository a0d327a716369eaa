"""CIFAR-10, the same minutes on the same cores: our recipe, and a plain torch loop with timm's model, loader and augmentation.

    python -m tests.measure.cifar_against_timm --data DIR --eval-data DIR --minutes 15 --steps N [section.key=value …]

The two take turns of half a minute: one is stopped (SIGSTOP, with all its workers) while the other runs, so that whatever
disturbs the machine disturbs both. `--steps` is the length of our run, chosen so that it ends within its minutes; the plain
loop anneals its rate over its minutes. Scores on the whole test set by launch/evaluate.py's own function, resp. a loop over it.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from pathlib import Path

TURN_S = 30.0
ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval-data", required=True)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--recipe", default="cifar10")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        run = Path(place) / "run"
        ours = ["launch/pretrain.py", "--recipe", args.recipe, "--run", run, "--data", args.data, "--eval-data", args.eval_data]
        ours += [f"train.length={args.steps}", "run.eval_every=0", "run.save_every=0", *args.overrides]
        theirs = [
            "-m",
            "tests.measure.plain_timm",
            args.data,
            args.eval_data,
            str(60 * args.minutes),
            Path(place) / "timm.json",
        ]
        used_s = take_turns({"ours": ours, "timm": theirs}, said=Path(place))
        scores = json.loads((run / "FINISHED.json").read_text())["eval"]
        plain = json.loads((Path(place) / "timm.json").read_text())
    for name, top1, images in (
        ("ours", scores["top1"], args.steps * 96),
        ("timm", plain["top1"], plain["images"]),
    ):
        print(f"{name}: top-1 {top1:.2%} on the test set after {used_s[name] / 60:.1f} min, {images:,} images seen")


def take_turns(commands: dict[str, list], *, said: Path) -> dict[str, float]:
    """Run all commands to their ends, one at a time; seconds each has had, start and last evaluation included."""
    running, used_s = {}, {}
    for name, command in commands.items():
        output = open(said / f"{name}.txt", "w")  # noqa: SIM115
        process = subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=ROOT, stdout=output, stderr=output, start_new_session=True
        )
        os.killpg(process.pid, signal.SIGSTOP)
        running[name], used_s[name] = process, 0.0
    while running:
        for name, process in list(running.items()):
            started_s = time.monotonic()
            os.killpg(process.pid, signal.SIGCONT)
            try:
                code = process.wait(TURN_S if len(running) > 1 else None)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGSTOP)
                code = None
            used_s[name] += time.monotonic() - started_s
            if code is not None:
                if code:
                    sys.exit((said / f"{name}.txt").read_text()[-3000:])
                del running[name]
            print(f"{name}: {used_s[name] / 60:.1f} min", file=sys.stderr, flush=True)
    return used_s


if __name__ == "__main__":
    main()
