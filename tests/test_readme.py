"""Every command of the README runs, in its order, in one directory with small stand-ins for the images it names.

Left out are the two commands that make environments. Training is cut to three steps of few images, bfloat16 being slow
without a GPU; the benchmark to an instant; cluster commands run without their launcher, trainings among them as --dry-run.
The object store is one of this machine.
"""

import io
import os
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.helpers.object_store import serve
from vitscale.base.files import read_json
from vitscale.training.metrics import read_lines

ROOT = Path(__file__).resolve().parents[1]
RUNS_BY_LAUNCHER = {
    "deepspeed": "runs/cifar10",
    "torchrun": "runs/digits-torchrun",
    "accelerate": "runs/digits-accelerate",
    "none": "runs/digits-python",
}
SHORT = "train.length=3 optim.global_batch=12 run.log_every=1 run.eval_every=3 run.save_every=3 run.parity=never"


def commands(text: str) -> list[str]:
    """The lines of all sh blocks, without comments and without those that make an environment."""
    lines: list[str] = []
    for block in text.split("```sh\n")[1:]:
        lines += block.split("```")[0].splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#") and "venv" not in line]


def as_run(command: str) -> str:
    """The command as this test runs it."""
    is_training = any(script in command for script in ("launch/pretrain.py", "launch/finetune.py"))
    if command.startswith(("srun", "deepspeed --hostfile")):
        return "python launch/" + command.split("launch/", 1)[1] + (" --dry-run --world 32" if is_training else "")
    if "launch/bench.py" in command:
        return command + " --seconds 0.2 --rounds 1 --image-size 32 --batch 8"
    if is_training and "--dry-run" not in command:
        return f"{command} {SHORT}"
    return command


def jpeg(seed: int, size: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((size, size)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_parquet(path: Path, images: int) -> None:
    """The layout of Hugging Face image datasets."""
    rows = [{"bytes": jpeg(number, 32), "path": None} for number in range(images)]
    pq.write_table(pa.table({"img": rows, "label": [number % 10 for number in range(images)]}), path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    base = tmp_path_factory.mktemp("readme")
    for name in ("launch", "ds_config.json"):
        (base / name).symlink_to(ROOT / name)
    write_parquet(base / "cifar10-train.parquet", 150)
    write_parquet(base / "cifar10-test.parquet", 40)
    for number in range(24):
        flower = "roses" if number < 3 else ("tulips", "daisies")[number % 2]  # each rose costs a figure
        folder = base / "photos" / flower
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(jpeg(number, 40 + number))
    write_table(base / "more.csv", images=60)
    for name in ("lilies", "asters"):
        write_tar(base / "flowers" / f"{name}.tar", {f"{name}_{number}.JPEG": jpeg(number, 40) for number in range(6)})
    for part in range(2):
        samples = range(30 * part, 30 * part + 30)
        images = {f"{number:05d}.jpg": jpeg(1000 + number, 32) for number in samples}
        labels = {f"{number:05d}.cls": b"%d" % (number % 10) for number in samples}
        write_tar(base / "others" / f"part-{part:03d}.tar", dict(sorted((images | labels).items())))
    (base / "names.txt").write_text("".join(f"{number}\n" for number in range(10)))
    return base


def write_table(path: Path, *, images: int) -> None:
    """A CSV of paths and labels, and the images it names."""
    folder = path.with_suffix("")
    folder.mkdir()
    lines = ["path,label"]
    for number in range(images):
        (folder / f"{number}.jpg").write_bytes(jpeg(500 + number, 32))
        lines.append(f"{folder.name}/{number}.jpg,{number % 10}")
    path.write_text("\n".join(lines) + "\n")


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))


@pytest.fixture(scope="module")
def store():
    """What a command needs in its environment to reach the store behind s3://bucket."""
    with serve() as server:
        yield server.environment()


@pytest.mark.slow
def test_every_command_of_the_readme_runs(place, store):
    env = {**os.environ, **store, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    env |= {"XDG_CACHE_HOME": str(place / "cache"), "TMPDIR": str(place / "tmp")}
    (place / "tmp").mkdir()
    found = commands((ROOT / "README.md").read_text())
    assert len(found) >= 24
    for command in found:
        done = subprocess.run(
            shlex.split(as_run(command)), cwd=place, env=env, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, f"{as_run(command)}\n{done.stdout}\n{done.stderr}"
    for launcher, run in RUNS_BY_LAUNCHER.items():
        assert read_json(place / run / "provenance" / "attempt-001.json")["launcher"] == launcher
        assert read_json(place / run / "FINISHED.json")["step"] == 3
    hashes = [
        read_lines_of(place / run, "samples_hash")
        for run in ("runs/digits-torchrun", "runs/digits-accelerate", "runs/digits-python")
    ]
    assert hashes[0] == hashes[1] == hashes[2]
    assert read_lines_of(place / "runs/streamed", "samples_hash") == read_lines_of(place / "runs/cifar10", "samples_hash")


def read_lines_of(run: Path, name: str) -> list:
    return [line[name] for line in read_lines(run / "metrics.jsonl") if "eval" not in line]


def test_the_ci_runs_the_test_command_of_the_readme():
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


def test_a_command_that_is_wrong_is_noticed():
    """The reader of the README finds commands, and leaves out only environments."""
    text = "a\n```sh\n# note\npython launch/pretrain.py --nonsense\npython3 -m venv .venv && x\n```\nb\n```sh\nls\n```\n"
    assert commands(text) == ["python launch/pretrain.py --nonsense", "ls"]
    assert as_run("srun -n 4 python launch/pretrain.py --run a") == "python launch/pretrain.py --run a --dry-run --world 32"
    assert as_run("srun -n 4 python launch/build_shards.py a --out b") == "python launch/build_shards.py a --out b"
