"""Laws of several ranks: the same bytes as one, no rank left behind, and no rank waited for without end."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import build as build_module
from data_pipeline import team as team_module
from data_pipeline.build import build_datasets
from data_pipeline.config import BuildConfig
from data_pipeline.scan import Scan, ScanSetup, scan_inputs
from data_pipeline.team import Team
from tests.helpers.builds import files_of
from vitscale.base.errors import ExitCode, TransientFault, UsageError, VitscaleError

CONFIG = BuildConfig(source="digits:eval", shard_bytes=None, shard_images=30)
DEFECT = 70


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole")
    build_datasets(CONFIG, out, workers=1, show_progress=False)
    return files_of(out)


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of life, and looks at them, that allow a patience of half a second."""
    monkeypatch.setattr(team_module, "BEAT_S", 0.02)
    monkeypatch.setattr(team_module, "LOOK_S", 0.02)


def start(
    out: Path,
    *,
    world: int,
    faults: dict[int, str] | None = None,
    prepare: Callable[[int], None] = lambda rank: None,
    patience_s: float = 30.0,
) -> list[ForkProcess]:
    """Fork the ranks of a build; an expected error becomes its exit code, as in the program."""

    def be(rank: int) -> None:
        os.environ["VITSCALE_FAULT"] = (faults or {}).get(rank, "")
        prepare(rank)
        team = Team(rank=rank, world=world, patience_s=patience_s)
        try:
            build_datasets(CONFIG, out, workers=1, team=team, show_progress=False)
        except VitscaleError as error:
            print(error, flush=True)
            os._exit(int(error.exit_code))
        except BaseException:
            os._exit(DEFECT)
        os._exit(0)

    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=be, args=(rank,)) for rank in range(world)]
    for rank in ranks:
        rank.start()
    return ranks


def together(scan_of_rank_1: Callable[..., Any]) -> Callable[[int], None]:
    """For `prepare`: rank 0 scans only when rank 1 has joined, which then does `scan_of_rank_1` instead."""

    def first(setup: ScanSetup, *arguments: Any, **more: Any) -> Scan:
        while not (setup.directory / "has-joined").exists():
            time.sleep(0.02)
        return scan_inputs(setup, *arguments, **more)

    def second(setup: ScanSetup, *arguments: Any, **more: Any) -> Any:
        (setup.directory / "has-joined").touch()
        return scan_of_rank_1(setup, *arguments, **more)

    def prepare(rank: int) -> None:
        build_module.scan_inputs = [first, second][rank]

    return prepare


def ends(ranks: list[ForkProcess], *, within_s: float = 60.0) -> list[int | None]:
    until_s = time.monotonic() + within_s
    for rank in ranks:
        rank.join(max(0.0, until_s - time.monotonic()))
        if rank.is_alive():
            rank.kill()
    return [rank.exitcode for rank in ranks]


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_give_the_bytes_of_one_process(tmp_path: Path, whole: dict[str, bytes], world: int) -> None:
    assert ends(start(tmp_path, world=world)) == [0] * world
    assert files_of(tmp_path) == whole


def test_ranks_continue_what_another_world_began(tmp_path: Path, whole: dict[str, bytes]) -> None:
    # The second one stops, or it could write all that is left.
    killed = start(tmp_path, world=2, faults={0: "kill@build.shard", 1: "stop@build.shard"})
    assert ends(killed[:1]) == [-signal.SIGKILL]
    killed[1].kill()
    killed[1].join()
    (tmp_path / ".build" / ".train-000011.parquet.tmp-1a").write_bytes(b"half")
    shards = sorted(path.name for path in tmp_path.glob("*.tar"))
    assert 0 < len(shards) < 12
    first = (tmp_path / shards[0]).stat().st_mtime_ns
    assert ends(start(tmp_path, world=3)) == [0] * 3
    assert files_of(tmp_path) == whole
    assert (tmp_path / shards[0]).stat().st_mtime_ns == first, "a finished shard is kept"


def test_a_rank_that_sleeps_through_the_end_finds_the_dataset(tmp_path: Path, whole: dict[str, bytes]) -> None:
    """Between two looks at the results of the others they may complete the build and clear the workshop."""

    def sleep_through(setup: ScanSetup, *_: object, team: Team, **__: object) -> None:
        while setup.directory.exists():
            time.sleep(0.02)
        team.wait_for_files([setup.directory / "scan-000000.parquet"])

    assert ends(start(tmp_path, world=2, prepare=together(sleep_through))) == [0, 0]
    assert files_of(tmp_path) == whole


def test_a_task_that_never_ends_is_named_with_its_owner(tmp_path: Path, often: None) -> None:
    leader, other = Team(rank=0, world=2), Team(rank=1, world=2, patience_s=0.5)
    with leader.leading(tmp_path, None) as let_join:
        let_join()
        assert leader.claim("train-000003")
        with (
            other.joining(tmp_path, None, is_over=lambda: False),
            pytest.raises(TransientFault, match=r"1 results of other ranks, first train-000003 \(claimed by rank 0\)"),
        ):
            other.wait_for_tasks(["train-000003"])


@pytest.mark.slow
def test_a_rank_whose_peer_is_gone_names_the_missing_piece(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def scan(setup: ScanSetup, *arguments: Any, **more: Any) -> Scan:
        while not any(setup.directory.glob("train-*.json")):
            time.sleep(0.02)
        return scan_inputs(setup, *arguments, **more)

    # The rank that is stopped holds a claim for ever.
    ranks = start(tmp_path, world=2, faults={0: "stop@build.shard"}, prepare=together(scan), patience_s=5.0)
    ranks[1].join(30)
    code = ranks[1].exitcode
    ranks[0].kill()
    ranks[0].join()
    assert code == ExitCode.TRANSIENT
    assert "train-0000" in capfd.readouterr().out


def test_a_claim_belongs_to_one_rank_of_one_start(tmp_path: Path) -> None:
    leader = Team(rank=0, world=2)
    with leader.leading(tmp_path, None) as let_join:
        let_join()
        assert [leader.claim("shard"), leader.claim("shard"), leader.claim("other")] == [True, False, True]
    again = Team(rank=0, world=2)
    with again.leading(tmp_path, None) as let_join:
        let_join()
        assert again.claim("shard")


def test_what_a_dead_start_left_lets_nobody_join(tmp_path: Path, often: None) -> None:
    with Team(rank=0, world=2).leading(tmp_path, "about") as let_join:
        let_join()
        time.sleep(0.1)
    assert (tmp_path / "start.json").exists()
    late = Team(rank=1, world=2, patience_s=0.5)
    with pytest.raises(TransientFault, match="rank 0 to list"), late.joining(tmp_path, "about", is_over=lambda: False):
        pass


def test_a_rank_joins_only_a_build_of_its_own_options(tmp_path: Path, often: None) -> None:
    other = Team(rank=1, world=2, patience_s=0.5)
    with Team(rank=0, world=2).leading(tmp_path, {"seed": 0}) as let_join:
        let_join()
        with pytest.raises(TransientFault), other.joining(tmp_path, {"seed": 1}, is_over=lambda: False):
            pass


def test_a_rank_that_comes_when_all_is_over_finds_the_dataset(tmp_path: Path, whole: dict[str, bytes]) -> None:
    build_datasets(CONFIG, tmp_path, workers=1, show_progress=False)
    [manifest] = build_datasets(CONFIG, tmp_path, workers=1, team=Team(rank=1, world=2), show_progress=False)
    assert manifest.images == 359
    assert files_of(tmp_path) == whole


def test_a_usage_error_is_met_by_every_rank(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        build_datasets(CONFIG, tmp_path, workers=1, team=Team(rank=0, world=2), show_progress=False)


def test_a_rank_says_what_it_alone_has_met(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """UsageError is printed by rank 0, unless rank 0 cannot know of it."""
    monkeypatch.setattr("data_pipeline.build.lay_out", lambda *_, **__: (_ for _ in ()).throw(UsageError("only here")))
    with pytest.raises(UsageError, match="only here") as caught:
        build_datasets(CONFIG, tmp_path, workers=1, show_progress=False)
    assert caught.value.every_rank_speaks
