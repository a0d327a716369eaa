"""The golden run: 20 fp32 steps on the embedded digits with one thread. `python -m tests.helpers.golden` rewrites its file."""

import json
import tempfile
from pathlib import Path

import torch

from tests.helpers.program import curve, run

PATH = Path(__file__).resolve().parents[1] / "golden" / "losses.json"
STEPS = 20


def golden_run(place: Path) -> list[dict[str, float]]:
    """Loss and gradient norm of each step. Shards are cut by number, so no byte count of a PNG enters the order."""
    options = ["--shard-images", "120", "--workers", "1"]
    run("build_shards", "digits:train", "--out", place / "data", *options, said=place / "build.txt")
    arguments = ["--data", place / "data", "--run", place / "run", f"train.length={STEPS}", "run.save_every=0"]
    run("pretrain", *arguments, said=place / "run.txt", cores=1)
    return [{"step": step, "loss": loss, "grad_norm": norm} for step, loss, norm in curve(place / "run", "loss", "grad_norm")]


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        steps = golden_run(Path(place))
    record = {"torch": torch.__version__.split("+")[0], "steps": steps}
    PATH.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {PATH}")


if __name__ == "__main__":
    main()
