"""Laws of the cache: the same samples as from disk, never above the limit, one download per node, nothing left behind."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from data_pipeline.cache import CacheTooSmall
from data_pipeline.config import AugmentConfig, DataConfig
from data_pipeline.fetcher import Fetcher
from data_pipeline.loader import eval_stream, train_stream
from data_pipeline.manifest import LOCATION, MANIFEST, Manifest
from data_pipeline.patience import Patience
from data_pipeline.remote import open_dataset, tars_of
from data_pipeline.stream import Stream
from tests.helpers.object_store import RATES, ObjectStore, serve
from tests.helpers.shards import numbered_images, numbered_labels, write_dataset
from vitscale.base.errors import HostFault, TransientFault
from vitscale.base.files import write_json

SIZES = [9, 4, 1, 17, 6, 12, 3, 8, 10, 5, 11]
STEPS = 12  # of 24 images: over three epochs
HASTY = Patience(stall_s=0.3, slow_s=0.1, slow_bytes_per_s=20_000, backoff_s=0.02, deadline_s=5.0)
AMPLE = 10**9


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Manifest:
    return write_dataset(tmp_path_factory.mktemp("set"), numbered_images(SIZES), numbered_labels(SIZES), [])


@pytest.fixture
def server(local) -> Iterator[ObjectStore]:
    with serve() as server:
        for file in local.directory.iterdir():
            server.objects[f"set/{file.name}"] = file.read_bytes()
        yield server


@pytest.fixture
def remote(server, tmp_path) -> Manifest:
    return open_dataset(f"{server.url}/set", cache_dir=tmp_path / "cache")


def fetcher_of(manifest: Manifest, cache: Path, *, limit: int = AMPLE, outstanding: int = 1, **options) -> Fetcher:
    settings = {"patience": HASTY, "threads": 2} | options
    return Fetcher([manifest], cache_dir=cache, cache_bytes=limit, outstanding=outstanding, **settings)


def entry_bytes(manifest: Manifest, shard: int) -> int:
    """Tar and index, as they lie beside the manifest of the local dataset."""
    return sum((manifest.directory / f"{manifest.shards[shard].name}.{kind}").stat().st_size for kind in ("tar", "parquet"))


def shards_themselves(numbers: list[int]) -> Iterable[tuple[int, int]]:
    """For lists that hold shard numbers instead of positions."""
    return [(0, number) for number in numbers]


def bytes_in(directory: Path) -> int:
    """All files of the datasets in a cache: what the limit is about."""
    total = 0
    for path in directory.glob("*/*"):
        if path.parent.name != "leases":
            try:
                total += path.stat().st_size
            except FileNotFoundError:
                continue
    return total


@contextmanager
def most_bytes_in(directory: Path) -> Iterator[list[int]]:
    """Watches a cache from a thread; the list holds the most bytes seen."""
    most, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            most[0] = max(most[0], bytes_in(directory))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        stop.set()
        thread.join()


def hashes(stream: Stream, micro_batches: int) -> list[int]:
    with closing(stream):
        return [next(stream).samples_hash for _ in range(micro_batches)]


def train_hashes(manifest: Manifest, cache: Path, *, workers: int = 0, limit: int = AMPLE) -> list[int]:
    stream = train_stream(
        [manifest],
        data=DataConfig(lanes=2, window=8, workers=workers, cache_dir=str(cache), cache_bytes=limit),
        augment=AugmentConfig(),
        image_size=8,
        seed=11,
        global_batch=24,
        micro_batch=6,
        rank=0,
        world=1,
        position=0,
    )
    return hashes(stream, STEPS * 4)


# ---- the same samples -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_remote_dataset_gives_the_samples_of_the_local_one(local, remote, tmp_path, workers):
    assert remote.fingerprint == local.fingerprint and remote.shards == local.shards
    assert train_hashes(remote, tmp_path / "cache", workers=workers) == train_hashes(local, tmp_path / "none", workers=0)
    assert not (tmp_path / "none").exists()


def test_local_records_with_remote_tars_give_the_same_samples(local, server, tmp_path):
    records = tmp_path / "records"
    records.mkdir()
    for file in local.directory.glob("*"):
        if file.suffix != ".tar":
            (records / file.name).write_bytes(file.read_bytes())
    write_json(records / LOCATION, {"tars_at": f"{server.url}/set"})
    manifest = open_dataset(str(records), cache_dir=tmp_path / "cache")
    assert train_hashes(manifest, tmp_path / "cache") == train_hashes(local, tmp_path / "none")
    assert not list(tars_of(manifest, tmp_path / "cache").glob("*.parquet"))


def test_an_evaluation_reads_every_image_once_through_the_cache(local, remote, tmp_path):
    def all_hashes(manifest: Manifest) -> list[int]:
        data = DataConfig(workers=0, cache_dir=str(tmp_path / "cache"), cache_bytes=2 * entry_bytes(local, 3) + 100_000)
        stream = eval_stream(manifest, data=data, augment=AugmentConfig(), image_size=8, micro_batch=7, rank=0, world=1)
        return [batch.samples_hash for batch in stream]

    assert all_hashes(remote) == all_hashes(local)


def test_a_bad_night_changes_no_byte(local, server, remote, tmp_path):
    server.rates = RATES
    gate = fetcher_of(remote, tmp_path / "cache")
    lists = [[shard] for shard in range(len(SIZES))]
    assert list(gate.follow(lists, shards_themselves)) == lists
    for shard in local.shards:
        for kind in ("tar", "parquet"):
            name = f"{shard.name}.{kind}"
            assert (tars_of(remote, tmp_path / "cache") / name).read_bytes() == (local.directory / name).read_bytes()


@pytest.mark.slow
def test_a_run_over_a_bad_store_sees_the_samples_of_a_good_one(local, server, remote, tmp_path):
    server.rates = RATES
    limit = 7 * entry_bytes(local, 3)  # 263 of the 290 kB that the dataset has
    assert train_hashes(remote, tmp_path / "cache", workers=2, limit=limit) == train_hashes(local, tmp_path / "none")


# ---- the limit ------------------------------------------------------------------------------------------------------


def test_the_cache_never_exceeds_its_limit(local, server, remote, tmp_path):
    cache = tmp_path / "cache"
    limit = 3 * entry_bytes(local, 3) + bytes_in(cache)
    server.bytes_per_s = 2_000_000
    server.rates = {"reset": 0.1, "short": 0.1}
    order = [number * 7 % len(SIZES) for number in range(40)]
    gate = fetcher_of(remote, cache, limit=limit, threads=4)
    with most_bytes_in(cache) as most:
        for numbers in gate.follow([[number] for number in order], shards_themselves):
            assert (tars_of(remote, cache) / f"{remote.shards[numbers[0]].name}.tar").exists()
    assert limit / 2 < most[0] <= limit
    assert gate.counts.evicted > 5 and gate.counts.lists == 40


def test_a_limit_below_what_one_step_needs_is_refused_with_the_number(local, remote, tmp_path):
    need = sum(entry_bytes(local, shard) for shard in range(6))
    gate = fetcher_of(remote, tmp_path / "cache", limit=need - 30_000, step_lists=6)
    with pytest.raises(CacheTooSmall, match=r"data\.cache_bytes .* set it to at least \d+") as caught:
        list(gate.follow([[shard] for shard in range(6)], shards_themselves))
    named = int(str(caught.value).partition("at least ")[2].partition(",")[0])
    assert named == need + (tars_of(remote, tmp_path / "cache") / MANIFEST).stat().st_size and caught.value.exit_code == 2
    again = fetcher_of(remote, tmp_path / "cache", limit=named, step_lists=6)
    assert len(list(again.follow([[shard] for shard in range(6)], shards_themselves))) == 6


def fewest_downloads(order: list[int], *, room: int) -> int:
    """Belady's optimum for entries of equal size, where the one in use stays."""
    held: set[int] = set()
    downloads = 0
    for place, shard in enumerate(order):
        if shard not in held:
            downloads += 1
            if len(held) == room:
                rest = order[place:]
                held.remove(max(held, key=lambda key: rest.index(key) if key in rest else len(order)))
            held.add(shard)
    return downloads


@pytest.mark.parametrize("room", [2, 3, 4])
def test_evictions_follow_the_known_future(tmp_path, room):
    equal = write_dataset(tmp_path / "set", numbered_images([4] * 6), numbered_labels([4] * 6), [])
    with serve() as server:
        for file in equal.directory.iterdir():
            server.objects[f"set/{file.name}"] = file.read_bytes()
        remote = dataclasses.replace(equal, tars_at=f"{server.url}/set")  # the indexes are local: entries of equal size
        order = [0, 1, 2, 3, 0, 1, 4, 0, 1, 2, 3, 4, 5, 2, 0, 3, 5, 1, 4, 2]
        gate = fetcher_of(remote, tmp_path / "cache", limit=room * equal.shards[0].tar_bytes)
        assert [shard for [shard] in gate.follow([[shard] for shard in order], shards_themselves)] == order
        assert len({shard.tar_bytes for shard in equal.shards}) == 1
        assert gate.counts.fetched == fewest_downloads(order, room=room)


# ---- several ranks --------------------------------------------------------------------------------------------------

RANK = """
import json, sys, time
from pathlib import Path
from data_pipeline.fetcher import Fetcher
from data_pipeline.remote import open_dataset
url, cache, limit, order = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
manifest = open_dataset(url, cache_dir=cache)
gate = Fetcher([manifest], cache_dir=cache, cache_bytes=limit, outstanding=1)
for numbers in gate.follow(([shard] for shard in order), lambda numbers: [(0, number) for number in numbers]):
    tar = cache / manifest.fingerprint / f"{manifest.shards[numbers[0]].name}.tar"
    assert tar.stat().st_size == manifest.shards[numbers[0]].tar_bytes
    print(numbers[0], flush=True)
print(json.dumps(gate.counts.fetched), flush=True)
"""


def start_rank(url: str, cache: Path, *, limit: int, order: list[int]) -> subprocess.Popen:
    command = [sys.executable, "-c", RANK, url, str(cache), str(limit), json.dumps(order)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_ranks_share_one_download_and_respect_what_the_other_needs(local, server, tmp_path):
    cache = tmp_path / "cache"
    server.bytes_per_s = 500_000
    order = list(range(len(SIZES)))
    ranks = [start_rank(f"{server.url}/set", cache, limit=AMPLE, order=order) for _ in range(2)]
    ends = [rank.communicate(timeout=60) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], ends
    for shard in local.shards:
        for kind in ("tar", "parquet"):
            assert server.sent[f"set/{shard.name}.{kind}"] == (local.directory / f"{shard.name}.{kind}").stat().st_size
    assert sum(int(out.splitlines()[-1]) for out, _ in ends) == len(SIZES)

    limit = 3 * entry_bytes(local, 3) + bytes_in(cache / "none") + 20_000
    with most_bytes_in(cache):
        ranks = [start_rank(f"{server.url}/set", cache, limit=limit, order=way * 2) for way in (order, order[::-1])]
        ends = [rank.communicate(timeout=60) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], ends
    assert bytes_in(cache) <= limit


@pytest.mark.slow
def test_a_rank_killed_in_mid_download_leaves_nothing_that_blocks_the_next(local, server, tmp_path):
    cache = tmp_path / "cache"
    server.bytes_per_s = 20_000
    rank = start_rank(f"{server.url}/set", cache, limit=AMPLE, order=[3, 5])
    give_up_at_s = time.monotonic() + 30
    while not any(path.stat().st_blocks for path in cache.glob("*/*.tar.part")) and time.monotonic() < give_up_at_s:
        time.sleep(0.01)
    rank.send_signal(signal.SIGKILL)
    rank.communicate()
    assert list(cache.glob("*/*.tar.part")) and list(cache.glob("leases/*"))
    server.bytes_per_s = 0
    remote = open_dataset(f"{server.url}/set", cache_dir=cache)
    limit = entry_bytes(local, 3) + bytes_in(cache / "none") + 20_000  # no room for what was left
    begun_at_s = time.monotonic()
    assert len(list(fetcher_of(remote, cache, limit=limit).follow([[3], [5]], shards_themselves))) == 2
    assert time.monotonic() - begun_at_s < 5
    assert not list(cache.glob("*/*.part")) and not list(cache.glob("leases/*"))


def test_a_guess_that_a_thread_has_replaced_meanwhile_refuses_nobody(local, remote, tmp_path, monkeypatch):
    limit = entry_bytes(local, 3) + 20_000
    gate = fetcher_of(remote, tmp_path / "cache", limit=limit)
    entries, publish = gate._entries, gate._publish_needs
    asked = []

    def publish_late(distances):
        """The sizes become known while the guess is being refused."""
        asked.append(len(asked))
        if len(asked) == 1:
            monkeypatch.setattr(entries, "size", lambda key: limit + 1)
            try:
                return publish(distances)
            finally:
                monkeypatch.undo()
                for key in distances:
                    entries.sizes(key)
        return publish(distances)

    gate._publish_needs = publish_late
    assert list(gate.follow([[3]], shards_themselves)) == [[3]]
    assert len(asked) >= 2


# ---- damage and refusal ---------------------------------------------------------------------------------------------


def test_a_wrong_byte_in_a_cached_file_is_found_and_fetched_again(local, server, remote, tmp_path):
    cache = tmp_path / "cache"
    list(fetcher_of(remote, cache).follow([[3]], shards_themselves))
    tar = tars_of(remote, cache) / f"{remote.shards[3].name}.tar"
    good = tar.read_bytes()
    tar.write_bytes(good[:700] + bytes([good[700] ^ 1]) + good[701:])
    os.utime(tar, (0, 0))
    gate = fetcher_of(remote, cache)
    list(gate.follow([[3]], shards_themselves))
    assert tar.read_bytes() == good and gate.counts.fetched == 1
    os.utime(tar, (0, 0))
    index = tar.with_suffix(".parquet")
    index.unlink()
    whole = fetcher_of(remote, cache)
    list(whole.follow([[3]], shards_themselves))
    assert index.read_bytes() == (local.directory / index.name).read_bytes()
    untouched = fetcher_of(remote, cache)
    list(untouched.follow([[3]], shards_themselves))
    assert untouched.counts.fetched == 0


def test_bytes_that_are_not_those_of_the_manifest_are_refused(local, server, remote, tmp_path):
    name = f"set/{remote.shards[3].name}.tar"
    good = server.objects[name]
    server.objects[name] = good[:700] + bytes([good[700] ^ 1]) + good[701:]
    with pytest.raises(HostFault, match=rf"{server.url}/{name} does not have the sha256 that the manifest holds"):
        list(fetcher_of(remote, tmp_path / "cache").follow([[3]], shards_themselves))
    server.objects[name] = good + b"x"
    with pytest.raises(HostFault, match=rf"{name} has \d+ bytes, but the manifest says \d+"):
        list(fetcher_of(remote, tmp_path / "cache").follow([[3]], shards_themselves))
    assert not list((tmp_path / "cache").glob("*/*.tar*"))


@pytest.mark.parametrize("status", ["401", "403", "404"])
def test_a_refusal_far_ahead_comes_out_of_the_gate_at_once(server, remote, tmp_path, status):
    name = f"set/{remote.shards[7].name}.tar"
    server.script[("GET", name)] = [status, "*"]
    gate = fetcher_of(remote, tmp_path / "cache").follow(([shard % 9] for shard in itertools.count()), shards_themselves)
    begun_at_s = time.monotonic()
    with pytest.raises(HostFault, match=f"{server.url}/{name}") as caught:
        for _ in gate:
            time.sleep(0.02)
    assert time.monotonic() - begun_at_s < 3
    assert caught.value.exit_code == 3 and caught.value.every_rank_speaks


def test_a_dead_store_is_transient_past_the_deadline(server, remote, tmp_path):
    server.rates = {"503": 1.0}
    gate = fetcher_of(remote, tmp_path / "cache", patience=dataclasses.replace(HASTY, deadline_s=0.5))
    begun_at_s = time.monotonic()
    with pytest.raises(TransientFault, match=f"gave up to read {server.url}/set/"):
        list(gate.follow([[0]], shards_themselves))
    assert time.monotonic() - begun_at_s < 5


def test_closing_ends_the_threads_in_mid_download_and_keeps_nothing_half(server, remote, tmp_path):
    server.bytes_per_s = 5_000
    gate = fetcher_of(remote, tmp_path / "cache")
    lists = gate.follow([[3], [5]], shards_themselves)
    consumer = threading.Thread(target=lambda: next(lists, None))
    gate_threads = lambda: [thread for thread in threading.enumerate() if thread.name.startswith("fetch-")]  # noqa: E731
    consumer.start()
    while not list((tmp_path / "cache").glob("*/*.part")):
        time.sleep(0.01)
    begun_at_s = time.monotonic()
    gate.close()
    assert time.monotonic() - begun_at_s < 2
    assert not gate_threads() and not list((tmp_path / "cache").glob("*/*.part"))
    consumer.join(10)


def test_a_manifest_cannot_lead_out_of_the_cache(server, local, tmp_path):
    record = json.loads((local.directory / MANIFEST).read_bytes())
    record["shards"][0]["name"] = "../../evil"
    server.objects["set/manifest.json"] = json.dumps(record).encode()
    with pytest.raises(Exception, match=r"names a shard .*evil.*expected plain file names"):
        open_dataset(f"{server.url}/set", cache_dir=tmp_path / "cache")


def test_no_dataset_at_a_url_is_one_sentence_with_the_url(server, tmp_path):
    with pytest.raises(Exception, match=rf"expected an object at {server.url}/nowhere/manifest\.json"):
        open_dataset(f"{server.url}/nowhere", cache_dir=tmp_path / "cache")
