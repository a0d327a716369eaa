"""The room that checkpoints need is estimated as they are, and what is too little is said in one sentence."""

from pathlib import Path

import pytest

from tests.helpers import small_engine
from tests.helpers.ranks import run_ranks
from tests.helpers.saves import STAGES, save
from tests.helpers.small_disk import on_small_disk, require_mounts
from vitscale.base.cluster import Cluster
from vitscale.planning.room import Room, Size, checkpoint_size, room_at, shortage

WIDE = ("model.width=96", "model.heads=2", "model.depth=2", "train.ema=[0.9, 0.99]")


def sizes(cluster: Cluster, place: Path) -> dict[tuple, tuple[Size, Size]]:
    """(estimated, real) of each stage and precision."""
    found = {}
    for stage in STAGES:
        for more in (("train.precision=bf16",), ("optim.optimizer=lion", "optim.moment_dtype=bf16")):
            config, ds = small_engine.settings(stage, cluster.world, *WIDE, *more)
            engine = small_engine.make(config, ds)
            small_engine.train(engine, config, range(1))
            checkpoints = place / f"{stage}{more[0]}"
            save(engine, checkpoints, step=1)
            files = list((checkpoints / "step-00000001").iterdir())
            real = Size(bytes=sum(file.stat().st_size for file in files), files=len(files) + 2)
            found[stage, more] = checkpoint_size(config, ds), real
            engine.close()
    return found


@pytest.mark.slow
def test_the_estimate_is_what_a_checkpoint_takes(tmp_path):
    """Within 5 %, but for the wrappers of the files: 60 kB in all."""
    for what, (estimated, real) in run_ranks(2, sizes, tmp_path)[0].items():
        assert 0 <= real.bytes - estimated.bytes <= 60_000 + 0.05 * real.bytes, (what, estimated, real)
        assert estimated.files == real.files, (what, estimated, real)


SIZE = Size(bytes=1000_000_000, files=10)


@pytest.mark.parametrize(
    ("room", "present", "said"),
    [
        (Room(bytes=3_000_000_000, files=30), 0, None),
        (Room(bytes=3_000_000_000, files=None), 0, None),
        (Room(bytes=2_999_999_999, files=30), 0, "room for 3.0 GB, but the 2 checkpoints of run.keep_last and the one being"),
        (Room(bytes=3_000_000_000, files=29), 0, "room for 29 files"),
        (Room(bytes=1_000_000_000, files=10), 2, None),
        (Room(bytes=1_000_000_000, files=10), 7, None),
        (Room(bytes=999_999_999, files=10), 2, "need about 1.0 GB more (1.0 GB each)"),
        (Room(bytes=999_999_999, files=10), 7, "need about 1.0 GB more"),
        (Room(bytes=0, files=0), 0, "need about 30 files more"),
    ],
)
def test_too_little_room_is_one_sentence(room, present, said):
    found = shortage(SIZE, room, keep_last=2, present=present, where=Path("runs/a"))
    assert (found is None) == (said is None) and (said is None or said in str(found))


def test_a_directory_that_is_not_there_yet_is_on_the_disk_of_the_one_above(tmp_path):
    there, above = room_at(tmp_path / "a" / "b"), room_at(tmp_path)
    assert abs(there.bytes - above.bytes) < 1 << 30 and there.bytes > 0


def room_before_and_after(place: Path) -> tuple[Room, Room]:
    before = room_at(place / "checkpoints")
    (place / "file").write_bytes(bytes(400_000))
    return before, room_at(place / "checkpoints")


def test_bytes_and_files_are_those_of_the_file_system(tmp_path):
    require_mounts()
    before, after = on_small_disk(tmp_path / "disk", "size=1m,nr_inodes=20", room_before_and_after, tmp_path / "disk")
    assert before == Room(bytes=1 << 20, files=19)
    assert after.files == 18 and before.bytes - after.bytes == 401_408
