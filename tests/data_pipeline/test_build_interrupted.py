"""Laws of interruption and of workers: the same bytes after any kill and with any number of processes."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from data_pipeline.build import build_dataset, build_datasets
from data_pipeline.config import BuildConfig
from data_pipeline.manifest import MANIFEST, Manifest, write_table
from data_pipeline.team import Team
from tests.helpers.builds import files_of, photograph
from tests.helpers.program import run
from tests.helpers.ranks import free_port
from tests.helpers.sources import digit_pngs
from vitscale.base.errors import EnvironmentFault, ExitCode, UsageError

REPOSITORY = Path(__file__).parents[2]
CONFIG = BuildConfig(source="digits:eval", shard_bytes=None, shard_images=60)
OPTIONS = ("digits:eval", "--shard-images", "60")


def build(out: Path, *, workers: int = 1, config: BuildConfig = CONFIG) -> Manifest:
    return build_dataset(config, out, workers=workers, show_progress=False)


def command(
    out: Path, *, workers: int, fault: str = "", source: str = OPTIONS[0], options: Sequence[str] = OPTIONS[1:], code: int = 0
) -> str:
    """The script, forked; it must leave with `code`. Returns what it said."""
    said = out.with_name(f"{out.name}-said.txt")
    words = (source, *options, "--out", out, "--workers", str(workers))
    return run("build_shards", *words, said=said, env={"VITSCALE_FAULT": fault}, code=code)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole")
    build(out)
    return files_of(out)


def stop_after(shard: int, *, out: Path, monkeypatch: pytest.MonkeyPatch, config: BuildConfig = CONFIG) -> None:
    """Leave the build as it is when `shard` is complete."""
    monkeypatch.setenv("VITSCALE_FAULT", f"raise@build.shard:shard={shard}")
    with pytest.raises(RuntimeError, match=r"build\.shard"):
        build(out, config=config)
    monkeypatch.delenv("VITSCALE_FAULT")


def test_a_build_killed_twice_continues_to_the_same_bytes(
    tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    command(tmp_path, workers=1, fault="kill@build.shard:shard=2", code=-signal.SIGKILL)
    assert not (tmp_path / MANIFEST).exists()
    first = (tmp_path / "train-000000.tar").stat()
    stop_after(4, out=tmp_path, monkeypatch=monkeypatch)
    build(tmp_path)
    assert files_of(tmp_path) == whole
    assert (tmp_path / "train-000000.tar").stat().st_mtime_ns == first.st_mtime_ns, "a finished shard is kept"


@pytest.mark.slow
def test_a_build_killed_in_the_scan_and_in_the_writing_continues_to_the_same_bytes(tmp_path: Path) -> None:
    """A source that is spilled, shrunk and split: everything the workshop can hold."""
    images = [{"bytes": photograph(n, height=40, width=40), "path": f"{n}.jpg"} for n in range(150)]
    write_table(tmp_path / "images.parquet", {"image": images, "label": [n % 3 for n in range(150)]})
    source = f"parquet:{tmp_path / 'images.parquet'}"
    options = ["--resize-short", "16", "--shard-images", "20", "--split", "train=0.7,eval=0.3", "--dedup"]
    words = {"workers": 1, "source": source, "options": options}
    command(tmp_path / "out", **words, fault="kill@build.piece:piece=1", code=-signal.SIGKILL)
    scanned = sorted((tmp_path / "out" / ".build").glob("scan-*"))
    assert [path.stem for path in scanned] == ["scan-000000", "scan-000001"]
    kept = scanned[0].stat().st_mtime_ns
    command(tmp_path / "out", **words, fault="kill@build.shard:shard=3", code=-signal.SIGKILL)
    assert scanned[0].stat().st_mtime_ns == kept, "a scanned piece is kept"
    command(tmp_path / "out", **words)
    config = BuildConfig(
        source=source,
        shard_bytes=None,
        shard_images=20,
        resize_short=16,
        split=(("train", "0.7"), ("eval", "0.3")),
        dedup=True,
    )
    build_datasets(config, tmp_path / "whole", workers=1, show_progress=False)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_launchers_change_no_byte(tmp_path: Path, whole: dict[str, bytes], launcher: str) -> None:
    start = {
        "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--"],
        "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port())],
    }[launcher]
    script = [str(REPOSITORY / "launch" / "build_shards.py"), *OPTIONS, "--out", str(tmp_path / "out"), "--workers", "2"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    ended = subprocess.run(
        [sys.executable, *start, *script], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count("fingerprint") == 1, "one rank speaks"
    assert files_of(tmp_path / "out") == whole


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3, 7])
def test_workers_change_no_byte(tmp_path: Path, whole: dict[str, bytes], workers: int) -> None:
    build(tmp_path, workers=workers)
    assert files_of(tmp_path) == whole


@pytest.mark.slow
def test_a_killed_worker_is_a_transient_fault_and_the_build_continues(tmp_path: Path, whole: dict[str, bytes]) -> None:
    """Not forked from here: the server that forks the workers has the environment of its start."""
    script = [
        sys.executable,
        str(REPOSITORY / "launch" / "build_shards.py"),
        *OPTIONS,
        "--out",
        str(tmp_path),
        "--workers",
        "2",
    ]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "VITSCALE_FAULT": "kill@build.shard:shard=2"}
    killed = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert killed.returncode == ExitCode.TRANSIENT
    assert killed.stderr.splitlines()[-1].startswith("error: a worker process was killed")
    assert "Traceback" not in killed.stderr
    build(tmp_path, workers=3)
    assert files_of(tmp_path) == whole


def test_damaged_and_half_written_files_of_a_killed_build_are_replaced(
    tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(3, out=tmp_path, monkeypatch=monkeypatch)
    tar = tmp_path / "train-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-512] + b"x" * 512)
    (tmp_path / "train-000002.parquet").unlink()
    (tmp_path / ".train-000004.parquet.tmp-77").write_bytes(b"half")
    for name in (".train-000004.tar.tmp-1a", "..train-000004.parquet.tmp-1a.tmp-2b", ".spill-000000.tmp-3c"):
        (tmp_path / ".build" / name).write_bytes(b"half")
    (tmp_path / ".build-done-4d").mkdir()
    build(tmp_path)
    assert not (tmp_path / ".build-done-4d").exists()
    assert files_of(tmp_path) == whole


def test_a_killed_build_refuses_other_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(1, out=tmp_path, monkeypatch=monkeypatch)
    before = files_of(tmp_path)
    with pytest.raises(UsageError, match=r"unfinished build begun with SOURCE=digits:eval, this command says SOURCE=digits:"):
        build(tmp_path, config=BuildConfig(source="digits:", shard_bytes=None, shard_images=60))
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("change", ["list", "bytes"])
def test_a_killed_build_refuses_changed_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    png = digit_pngs(10)
    folder = tmp_path / "source" / "a"
    folder.mkdir(parents=True)
    for number in range(6):
        (folder / f"{number}.png").write_bytes(png[number])
    config = BuildConfig(source=f"imagefolder:{tmp_path / 'source'}", shard_bytes=None, shard_images=2)
    stop_after(0, out=tmp_path / "out", monkeypatch=monkeypatch, config=config)
    if change == "list":
        (folder / "6.png").write_bytes(png[6])
    else:
        for number in range(6):
            (folder / f"{number}.png").write_bytes(png[9 - number])
    with pytest.raises(UsageError, match="--replan"):
        build(tmp_path / "out", config=config)


def test_two_builds_never_share_a_directory(tmp_path: Path) -> None:
    one, other = Team(), Team()
    with (
        one.leading(tmp_path / ".build", None),
        pytest.raises(EnvironmentFault, match="another build"),
        other.leading(tmp_path / ".build", None),
    ):
        pass
