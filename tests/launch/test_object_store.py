"""A training over an object store, by the real script: the images of a local one, through faults, a kill and a small cache."""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.object_store import RATES, ObjectStore, serve
from tests.helpers.program import SMALL, curve, run
from tests.helpers.ranks import cluster_of, free_port
from vitscale.base.files import read_json
from vitscale.training.metrics import read_lines

ROOT = Path(__file__).resolve().parents[2]
ARGUMENTS = [*SMALL, "run.save_every=5", "run.eval_every=10", "run.log_every=1", "data.window=8", "data.lanes=2"]


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """Digits in 24 and 6 shards."""
    base = tmp_path_factory.mktemp("sets")
    for half in ("train", "eval"):
        options = ["--out", base / half, "--shard-images", "60", "--workers", "1"]
        run("build_shards", f"digits:{half}", *options, said=base / f"{half}.txt")
    return base


@pytest.fixture
def server(sets) -> Iterator[ObjectStore]:
    with serve() as server:
        for half in ("train", "eval"):
            for file in (sets / half).iterdir():
                server.objects[f"bucket/{half}/{file.name}"] = file.read_bytes()
        yield server


def start_ranks(*arguments: str | Path, said: Path, env: dict[str, str], world: int) -> list[subprocess.Popen]:
    """Not forked from here: obstore's threads, if a test has started them, would be missing in the ranks."""
    port = free_port()
    command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), *map(str, arguments)]
    ranks = []
    for rank in range(world):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **env, **cluster_of(rank, world, port).environment()}
        with said.open("a") as output:
            ranks.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output, cwd=ROOT))
    return ranks


def codes_of(ranks: list[subprocess.Popen]) -> list[int]:
    try:
        return [rank.wait(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


@contextmanager
def most_bytes_in(cache: Path) -> Iterator[list[int]]:
    """Watches from outside; the list holds the most bytes seen of all files but the leases, which are empty or lists."""
    most, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.005):
            total = 0
            for path in cache.glob("*/*"):
                try:
                    total += path.stat().st_size if path.parent.name != "leases" else 0
                except FileNotFoundError:
                    continue
            most[0] = max(most[0], total)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        stop.set()
        thread.join()


@pytest.mark.slow
def test_two_ranks_train_through_a_small_cache_a_kill_in_mid_download_and_a_bad_night(sets, server, tmp_path):
    local, directory, cache = tmp_path / "local", tmp_path / "r", tmp_path / "cache"
    paths = ["--data", sets / "train", "--eval-data", sets / "eval"]
    run("pretrain", "--run", local, *paths, *ARGUMENTS, said=tmp_path / "local.txt")

    def start(limit: int, said: str) -> list[subprocess.Popen]:
        urls = ["--data", "s3://bucket/train", "--eval-data", "s3://bucket/eval"]
        settings = [f"data.cache_dir={cache}", f"data.cache_bytes={limit}"]
        arguments = ["--run", directory, *urls, *ARGUMENTS, *settings]
        return start_ranks(*arguments, said=tmp_path / said, env=server.environment(), world=2)

    assert codes_of(start(1000, "refused.txt")) == [2, 2]
    said = (tmp_path / "refused.txt").read_text()
    assert said.count("error:") == 1 and "Traceback" not in said and not directory.exists()
    limit = int(re.findall(r"set it to at least (\d+)", said)[0])
    assert limit < sum(len(content) for content in server.objects.values())

    server.bytes_per_s = 50_000
    with most_bytes_in(cache) as most:
        ranks = start(limit, "killed.txt")
        give_up_at_s = time.monotonic() + 60
        metrics = directory / "metrics.jsonl"
        while not (metrics.exists() and len(read_lines(metrics)) >= 6 and any(cache.glob("*/*.tar.part"))):
            assert time.monotonic() < give_up_at_s and all(rank.poll() is None for rank in ranks), said
            time.sleep(0.01)
        for rank in ranks:
            rank.kill()
        assert codes_of(ranks) == [-9, -9] and list(cache.glob("*/*.tar.part"))

        server.bytes_per_s, server.rates = 0, RATES
        assert codes_of(start(limit, "again.txt")) == [0, 0], (tmp_path / "again.txt").read_text()
    assert "continuing after step 5" in (tmp_path / "again.txt").read_text()
    assert most[0] <= limit and not list(cache.glob("*/*.part")) and not list(cache.glob("leases/*"))
    assert curve(directory, "samples_hash", "images_seen") == curve(local, "samples_hash", "images_seen")
    assert read_json(directory / "FINISHED.json")["eval"]["images"] == 359
