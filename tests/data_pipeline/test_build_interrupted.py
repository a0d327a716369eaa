"""Laws of interruption and of workers: the same bytes after any kill and with any number of processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.build import build_dataset
from data_pipeline.config import BuildConfig
from data_pipeline.manifest import MANIFEST, Manifest
from data_pipeline.team import Team
from tests.helpers.sources import digit_pngs
from vitscale.base.errors import EnvironmentFault, ExitCode, UsageError

REPOSITORY = Path(__file__).parents[2]
CONFIG = BuildConfig(source="digits:eval", shard_bytes=None, shard_images=60)


def build(out: Path, *, workers: int = 1, config: BuildConfig = CONFIG) -> Manifest:
    return build_dataset(config, out, workers=workers, show_progress=False)


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def command(out: Path, *, workers: int, fault: str = "") -> subprocess.CompletedProcess[str]:
    script = [sys.executable, str(REPOSITORY / "launch" / "build_shards.py")]
    options = ["digits:eval", "--out", str(out), "--shard-images", "60", "--workers", str(workers)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "VITSCALE_FAULT": fault}
    return subprocess.run([*script, *options], env=environment, capture_output=True, text=True, timeout=120, check=False)


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
    killed = command(tmp_path, workers=1, fault="kill@build.shard:shard=2")
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / MANIFEST).exists()
    first = (tmp_path / "train-000000.tar").stat()
    stop_after(4, out=tmp_path, monkeypatch=monkeypatch)
    build(tmp_path)
    assert files_of(tmp_path) == whole
    assert (tmp_path / "train-000000.tar").stat().st_mtime_ns == first.st_mtime_ns, "a finished shard is kept"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3, 7])
def test_workers_change_no_byte(tmp_path: Path, whole: dict[str, bytes], workers: int) -> None:
    build(tmp_path, workers=workers)
    assert files_of(tmp_path) == whole


@pytest.mark.slow
def test_a_killed_worker_is_a_transient_fault_and_the_build_continues(tmp_path: Path, whole: dict[str, bytes]) -> None:
    killed = command(tmp_path, workers=2, fault="kill@build.shard:shard=2")
    assert killed.returncode == ExitCode.TRANSIENT
    assert killed.stderr.splitlines()[-1].startswith("error: a worker process was killed")
    assert "Traceback" not in killed.stderr
    continued = command(tmp_path, workers=3)
    assert continued.returncode == 0, continued.stderr
    assert files_of(tmp_path) == whole


def test_damaged_and_half_written_files_of_a_killed_build_are_replaced(
    tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(3, out=tmp_path, monkeypatch=monkeypatch)
    tar = tmp_path / "train-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-512] + b"x" * 512)
    (tmp_path / "train-000002.parquet").unlink()
    (tmp_path / ".train-000004.parquet.tmp-77").write_bytes(b"half")
    (tmp_path / ".build" / "train-000004.tar.tmp").write_bytes(b"half")
    build(tmp_path)
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
