"""What a rollback means for whoever restores a checkpoint: the jumps that begin there, and checkpoints that were given up."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import run_ranks
from vitscale.base.cluster import Cluster
from vitscale.base.files import write_json
from vitscale.training.checkpoint import RECORD, SCHEMA_VERSION, TrainState, candidates, directory_name, sealed
from vitscale.training.rollback import (
    ROLLBACKS,
    finish_rollbacks,
    is_given_up,
    jumped,
    newest_before,
    read_rollbacks,
    segment_of,
    taken_up,
)


def rollback(at: int, to: int, start: int, end: int) -> dict[str, Any]:
    return {"rollback_at_step": at, "to_step": to, "from_position": start, "to_position": end, "skipped": [{"step": at}]}


FIRST = rollback(26, 20, 200, 260)
AGAIN = rollback(24, 20, 260, 300)
LATER = rollback(39, 32, 420, 490)


def test_jumps_begin_where_a_record_says_and_chain():
    state = TrainState(step=20, position=200, images_seen=200, segments=[{"branch_step": 3}])
    there = jumped(state, [FIRST, AGAIN, LATER])
    segments = [{"branch_step": 3}, segment_of(FIRST), segment_of(AGAIN)]
    assert there == replace(state, position=300, segments=segments) and "skipped" not in segments[1]
    assert jumped(there, [FIRST, AGAIN, LATER]) == there, "a state that has jumped stays"
    elsewhere = replace(state, position=210)
    assert jumped(elsewhere, [FIRST, AGAIN]) == elsewhere, "another way to the same step knows nothing of it"
    assert jumped(replace(state, step=21), [FIRST]) == replace(state, step=21)


@pytest.mark.parametrize(
    ("step", "segments", "given_up"),
    [
        (16, [], False),  # older than the rollback
        (20, [], False),  # where it went back to
        (24, [], True),  # younger, and does not know
        (24, [FIRST], True),  # knows the first only
        (24, [FIRST, AGAIN], False),
        (36, [FIRST, AGAIN], True),
        (36, [FIRST, AGAIN, LATER], False),
    ],
)
def test_a_younger_checkpoint_must_know_of_every_rollback(step, segments, given_up):
    state = {"step": step, "segments": [segment_of(record) for record in segments]}
    assert is_given_up(state, [FIRST, AGAIN, LATER]) == given_up


def write_checkpoint(run: Path, step: int, segments: list[dict[str, int]]) -> None:
    directory = run / "checkpoints" / directory_name(step)
    directory.mkdir(parents=True)
    state = {"step": step, "segments": segments}
    record = {"schema_version": SCHEMA_VERSION, "state": state, "files": [], "world": 2, "zero_stage": 1, "data": {}}
    write_json(directory / RECORD, sealed(record))


def start(cluster: Cluster, run: Path) -> list[Any]:
    """What the start of a program does around the search for its checkpoint, here of step 20, then of step 16."""
    finish_rollbacks(run, rank=cluster.rank)
    left = [path.name for path in candidates(run / "checkpoints")]
    at_20 = taken_up(run, TrainState(step=20, position=200), rank=cluster.rank)
    at_16 = taken_up(run, TrainState(step=16, position=160), rank=cluster.rank)
    again_at_20 = taken_up(run, TrainState(step=20, position=200), rank=cluster.rank)
    said: list[str] = []
    found = [newest_before(step, run / "checkpoints", rank=cluster.rank, say=said.append) for step in (29, 28, 16)]
    return [left, at_20, at_16, again_at_20, [saved and saved.state.step for saved in found], said]


@pytest.mark.slow
def test_a_start_ends_a_rollback_that_was_killed_and_forgets_those_still_ahead(tmp_path):
    write_json(tmp_path / ROLLBACKS, [FIRST])
    for step in (16, 20, 24, 25):
        write_checkpoint(tmp_path, step, [])
    (tmp_path / "checkpoints" / "step-00000025.keep").touch()
    write_checkpoint(tmp_path, 28, [segment_of(FIRST)])
    (tmp_path / "checkpoints" / "step-00000020" / RECORD).write_text("{}")
    by_rank = run_ranks(2, start, tmp_path)
    assert by_rank[0][:5] == by_rank[1][:5] and by_rank[1][5] == []
    left, at_20, at_16, again_at_20, older, said = by_rank[0]
    assert older == [28, 16, None] and len(said) == 1 and "step-00000020 is not usable to roll back to" in said[0]
    assert left == ["step-00000028", "step-00000020", "step-00000016"]
    assert at_20 == (TrainState(step=20, position=260, segments=[segment_of(FIRST)]), [FIRST])
    assert at_16 == (TrainState(step=16, position=160), []) and read_rollbacks(tmp_path) == []
    assert again_at_20 == (TrainState(step=20, position=200), [])
    assert json.loads((tmp_path / ROLLBACKS).read_text()) == [] and not list(tmp_path.glob("checkpoints/*.partial"))
    assert [path.name for path in tmp_path.glob("checkpoints/*.bad-*")] == ["step-00000025.bad-1"], (
        "protected by its .keep file"
    )
