"""Laws of stores: right bytes through any fault that passes, one sentence with the URL for any that does not, in time."""

import dataclasses
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline import patience as patience_module
from data_pipeline import store as store_module
from data_pipeline.patience import Patience, Stopped
from data_pipeline.store import Store, is_url, open_store
from tests.helpers.object_store import RATES, ObjectStore, serve
from vitscale.base.errors import EnvironmentFault, TransientFault, UsageError

HASTY = Patience(stall_s=0.2, slow_s=0.1, slow_bytes_per_s=20_000, backoff_s=0.02, deadline_s=2.0)
CONTENT = bytes(range(256)) * 1000  # 256,000 bytes: in ranges of 50,000 below
NAME = "bucket/set/object"
CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


@pytest.fixture
def server(monkeypatch) -> Iterator[ObjectStore]:
    with serve() as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(store_module, "RANGE_BYTES", 50_000)
        server.objects[NAME] = CONTENT
        yield server


@pytest.fixture(params=["s3", "http"])
def store(request, server) -> Store:
    return open_store("s3://bucket/set" if request.param == "s3" else f"{server.url}/bucket/set", patience=HASTY)


def test_objects_are_read_whole_in_pieces_and_by_their_end(store, server):
    assert store.read("object") == CONTENT
    assert server.count("GET", NAME) == 6
    assert store.size("object") == len(CONTENT)
    assert store.read_range("object", 49_990, 20) == CONTENT[49_990:50_010]
    assert store.read_range("object", len(CONTENT) - 3, 10) == CONTENT[-3:]
    assert store.read_range("object", len(CONTENT) + 5, 10) == b""
    server.objects["bucket/set/empty"] = b""
    assert store.read("empty") == b""


@pytest.mark.parametrize("fault", ["500", "503", "429", "408", "reset", "short", "less", "stall", "drip"])
def test_a_fault_that_passes_costs_a_request_and_no_byte(store, server, fault):
    server.script[("GET", NAME)] = ["", fault, fault]
    begun_at_s = time.monotonic()
    assert store.read("object") == CONTENT
    # Two requests more; one where the halves that came before the breaks are the bytes of a whole range.
    assert server.count("GET", NAME) == (7 if fault in ("reset", "short", "less") else 8) and time.monotonic() - begun_at_s < 2
    # What came before a break is kept: half a range at a time, or a few hundred bytes of a drip.
    assert server.sent[NAME] <= len(CONTENT) * 1.05


def test_a_bad_night_gives_the_right_bytes(store, server):
    server.rates = RATES
    assert [store.read("object") == CONTENT for _ in range(8)] == [True] * 8


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("401", "expected to read {url}/object, but the store refuses access with 401"),
        ("403", "expected to read {url}/object, but the store refuses access with 403"),
        ("404", "expected an object at {url}/object, but the store has none"),
        ("400", "expected to read {url}/object, got: .*status code: 400"),
        ("416", "expected to read {url}/object, got: .*status code: 416"),
        ("301", "expected to read {url}/object, got: .*redirect"),
        ("more", "{url}/object sent more bytes than the range asked for"),
        ("changed", "{url}/object changed while it was read"),
    ],
)
def test_an_answer_that_will_not_change_ends_at_once_with_the_url(store, server, fault, sentence):
    server.script[("GET", NAME)] = ["", fault]
    begun_at_s = time.monotonic()
    with pytest.raises(EnvironmentFault, match=sentence.format(url=store.url)) as caught:
        store.read("object")
    assert time.monotonic() - begun_at_s < 1 and caught.value.exit_code == 3
    assert "\n" not in str(caught.value) and server.count("GET", NAME) == 2


@pytest.mark.parametrize("fault", ["403", "404"])
def test_a_refused_head_ends_at_once_too(store, server, fault):
    server.script[("HEAD", NAME)] = [fault]
    with pytest.raises(EnvironmentFault, match=f"{store.url}/object"):
        store.size("object")


@pytest.mark.parametrize("fault", ["503", "drip"])
def test_a_store_that_stays_bad_is_given_up_at_the_deadline(server, fault):
    server.script[("GET", NAME)] = ["", fault, "*"]
    patience = dataclasses.replace(HASTY, deadline_s=0.3, slow_bytes_per_s=1_000_000)
    store = open_store("s3://bucket/set", patience=patience)
    begun_at_s = time.monotonic()
    with pytest.raises(TransientFault, match=r"gave up to read s3://bucket/set/object after \d s, the last error being: "):
        store.read("object")
    assert 0.3 < time.monotonic() - begun_at_s < 3


def test_a_host_that_is_not_there_is_given_up_too():
    store = open_store("http://127.0.0.1:1/set", patience=dataclasses.replace(HASTY, deadline_s=0.2))
    with pytest.raises(TransientFault, match=r"http://127\.0\.0\.1:1/set/object"):
        store.read("object")


def test_waits_grow_while_nothing_comes_and_start_small_after_progress(server, monkeypatch):
    tops = []
    monkeypatch.setattr(patience_module.random, "uniform", lambda low, high: tops.append(high) or 0.0)
    server.script[("GET", NAME)] = ["503"] * 6 + ["less", "503"]
    open_store("s3://bucket/set", patience=dataclasses.replace(HASTY, backoff_max_s=0.3)).read("object")
    assert tops == pytest.approx([0.02, 0.04, 0.08, 0.16, 0.3, 0.3, 0.02, 0.04])


def test_a_reader_stops_soon_after_it_is_told(store, server):
    server.bytes_per_s = 100_000
    stop = threading.Event()
    pieces = store.chunks("object", stop=stop)
    next(pieces)
    stop.set()
    with pytest.raises(Stopped):
        next(pieces)


def test_an_object_is_pinned_over_reads_of_ranges_but_a_fresh_read_takes_it_as_it_is(store, server):
    assert store.read_range("object", 0, 4) == CONTENT[:4]
    server.objects[NAME] = CONTENT[::-1]
    with pytest.raises(EnvironmentFault, match="changed while it was read"):
        store.read_range("object", 4, 4)
    assert store.read("object") == CONTENT[::-1]


def test_what_is_written_can_be_read_listed_and_deleted(server, tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "PART_BYTES", 5 << 20)
    store = open_store("s3://bucket/set", patience=HASTY)
    large = CONTENT * 50  # 12.8 MB: three parts
    (tmp_path / "file").write_bytes(large)
    store.write("folder/small", b"abc")
    store.write("folder/large", Path(tmp_path / "file"))
    assert server.objects["bucket/set/folder/small"] == b"abc" and server.objects["bucket/set/folder/large"] == large
    assert server.count("PUT", "bucket/set/folder/large") == 3
    server.objects |= {f"bucket/set/many/{number:04d}": b"" for number in range(1500)}
    assert store.list("folder") == ["folder/large", "folder/small"]
    assert store.list("many") == [f"many/{number:04d}" for number in range(1500)]
    assert len(store.list("")) == 1503
    store.delete("folder/small")
    assert store.list("folder") == ["folder/large"]
    store.write("object", b"new")
    assert store.read_range("object", 0, 9) == b"new"


def test_writing_survives_faults_and_shows_no_part(server, monkeypatch):
    monkeypatch.setattr(store_module, "PART_BYTES", 5 << 20)
    store = open_store("s3://bucket/set", patience=HASTY)
    server.script[("PUT", "bucket/set/large")] = ["503", "", "500"]
    server.script[("POST", "bucket/set/large")] = ["503"]
    store.write("large", CONTENT * 50)
    assert server.objects["bucket/set/large"] == CONTENT * 50 and not server.uploads
    server.script[("PUT", "bucket/set/refused")] = ["", "403"]
    with pytest.raises(EnvironmentFault, match=r"expected to write s3://bucket/set/refused, but .* with 403"):
        store.write("refused", CONTENT * 50)
    assert "bucket/set/refused" not in server.objects


def test_http_writes_in_one_request_and_lists_nothing(server):
    store = open_store(f"{server.url}/bucket/set", patience=HASTY)
    store.write("new", b"abc")
    assert server.objects["bucket/set/new"] == b"abc"
    with pytest.raises(EnvironmentFault, match=f"expected to read {server.url}/bucket/set"):
        store.list("")


def test_public_buckets_are_read_without_credentials_and_a_refusal_says_so(server, monkeypatch):
    assert open_store("s3://bucket/set").size("object") and server.authorized[-1]
    for name in CREDENTIALS:
        monkeypatch.delenv(name)
    store = open_store("s3://bucket/set", patience=HASTY)
    assert store.read("object") == CONTENT and not server.authorized[-1]
    server.script[("GET", NAME)] = ["403"]
    with pytest.raises(EnvironmentFault, match="asked without credentials: set AWS_ACCESS_KEY_ID"):
        store.read("object")


def test_only_urls_of_stores_are_taken():
    assert [is_url(text) for text in ("s3://b/p", "gs://b", "az://c", "http://h/p", "https://h")] == [True] * 5
    assert [is_url(text) for text in ("/s3/b", "s3:/b", "file:///x", "digits:", "parquet:s3://b", "C://x")] == [False] * 6
    assert open_store("gs://bucket/set").url_of("x") == "gs://bucket/set/x"
    for url, sentence in (
        ("s3://", "expected a URL such as"),
        ("/tmp/set", "expected a URL such as"),
        ("https://user:word@host/set", "without user, query and fragment, got one at host/set; credentials belong"),
        ("https://host/set?token=word", "without user, query and fragment, got one at host/set"),
        ("s3://KEY:wo/word@bucket/set", "without user, query and fragment, got one; credentials belong"),
    ):
        with pytest.raises(UsageError, match=sentence) as caught:
            open_store(url)
        assert "word" not in str(caught.value)


def test_a_trickle_among_quick_bodies_is_known_early_and_a_slow_network_is_not_one(server, monkeypatch):
    patience = dataclasses.replace(HASTY, slow_s=0.8)
    server.objects["bucket/set/large"] = bytes(1 << 20) * 2
    server.script[("GET", NAME)] = ["drip"]
    store = open_store("s3://bucket/set", patience=patience)
    begun_at_s = time.monotonic()
    store.read("object")  # nothing is known as yet
    assert time.monotonic() - begun_at_s > 0.8

    monkeypatch.setattr(store_module, "RANGE_BYTES", 1 << 20)
    for _ in range(2):
        store.read("large")
    server.script[("GET", NAME)] = ["drip"]
    begun_at_s = time.monotonic()
    assert store.read("object") == CONTENT
    assert time.monotonic() - begun_at_s < 0.6

    # The network has become slow for all: one early mistake for the object, then it is left alone.
    server.bytes_per_s, before = 200_000, server.count("GET", NAME)
    assert store.read("object") == CONTENT
    assert server.count("GET", NAME) - before == 2
