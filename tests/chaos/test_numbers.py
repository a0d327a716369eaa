"""Numbers going bad in a whole run: the way back, the data that is left out, and kills in the middle of it."""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import launch.assemble as assemble
from data_pipeline.loader import mixture_of, sample_hash
from data_pipeline.manifest import read_manifest
from data_pipeline.names import names_at
from launch.phased import PhasedStream
from tests.helpers.program import SMALL, curve, run, start
from vitscale.base.files import read_json
from vitscale.config import from_record
from vitscale.training.checkpoint import candidates, newest_valid
from vitscale.training.metrics import read_lines
from vitscale.training.objective import Loss, Objective
from vitscale.training.partitions import consolidate

pytestmark = pytest.mark.slow

BATCH = 96
ARGUMENTS = (
    *SMALL,
    "optim.micro_batch_max=24",
    "train.length=9",
    "train.precision=fp32",
    "run.save_every=2",
    "run.keep_last=3",
    "run.eval_every=0",
    "run.log_every=1",
    "run.parity=never",
    "run.integrity_every=5",
    "data.workers=1",
    "train.rollback_jump=1",
)
BAD = (4, 5, 6)
"""Numbers of the batches of the order, from 1 on, whose loss is not finite on the last rank."""
BACK = {"rollback_at_step": 6, "to_step": 2, "from_position": 2 * BATCH, "to_position": 7 * BATCH}
"""The checkpoint of step 4 is not older than the first bad step."""
LONG = pytest.mark.skipif("VITSCALE_LONG_TESTS" not in os.environ, reason="set VITSCALE_LONG_TESTS=1 for the long form")
NAMES = ("loss", "grad_norm", "lr", "samples_hash", "images_seen", "skipped")


@pytest.fixture(autouse=True)
def bad_batches(monkeypatch) -> Iterator[set[int]]:
    """What is bad is the data, wherever the run meets it. Ranks are forked from this process and see the change."""
    position, bad = [0], set(BAD)

    class Watched(PhasedStream):
        def __next__(self) -> Any:
            batch = super().__next__()
            position[0] = self._position
            return batch

    def objective(self: Objective, forward: Any, *batch: Any, **slot: int) -> Loss:
        loss = plain(self, forward, *batch, **slot)
        is_bad = position[0] // BATCH + 1 in bad and forward.rank == forward.world - 1
        return Loss(loss.trained * math.nan, loss.reported * math.nan) if is_bad else loss

    plain = Objective.__call__
    monkeypatch.setattr(Objective, "__call__", objective)
    monkeypatch.setattr(assemble, "PhasedStream", Watched)
    yield bad


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The digits, built once for all runs."""
    base = tmp_path_factory.mktemp("data")
    run("build_shards", "digits:train", "--out", base / "set", "--shard-images", "200", "--workers", "1", said=base / "a.txt")
    return base / "set"


def arguments(directory: Path, data: Path, stage: int, *more: str) -> list[str | Path]:
    return ["--run", directory, "--data", data, *ARGUMENTS, f"ds.zero_optimization.stage={stage}", *more]


def events(directory: Path, kind: str) -> list[dict[str, Any]]:
    lines = [line for line in read_lines(directory / "events.jsonl") if line["event"] == kind]
    return [{name: value for name, value in line.items() if name != "at_unix_s"} for line in lines]


def weights(directory: Path) -> dict[str, list[float]]:
    return {name: value.tolist() for name, value in consolidate(newest_valid(directory / "checkpoints")[0]).items()}


def hashes_of(directory: Path, data: Path, positions: list[int]) -> list[str]:
    """samples_hash of the batches that begin at `positions`, from the order and the index alone."""
    config, manifest = from_record(read_json(directory / "config.json")), read_manifest(data)
    mixture = mixture_of([manifest], data=config.data, seed=config.train.seed)
    hashes = []
    for first in positions:
        named = names_at([manifest], mixture, np.arange(first, first + BATCH)).values()
        keys = [key.encode() for shards in named for keys in shards.values() for key in keys]
        assert len(keys) == BATCH
        hashes.append(f"{sum(sample_hash(manifest.fingerprint, key) for key in keys) % 2**64:016x}")
    return hashes


@pytest.mark.parametrize(
    ("stage", "faults"),
    [
        pytest.param(0, ["rollback.recorded"], marks=LONG),
        (2, ["step.end:step=5", "rollback.deleted:rank=1", "step.end:step=4"]),
        pytest.param(3, ["rollback.recorded"], marks=LONG),
    ],
)
def test_a_rollback_leaves_out_what_it_records_and_kills_in_it_change_nothing(tmp_path, data, stage, faults):
    quiet, stormy = tmp_path / "quiet", tmp_path / "stormy"
    said = run("pretrain", *arguments(quiet, data, stage), said=tmp_path / "quiet.txt", world=2)
    assert "rolled back from step 6 to step 2; the data goes on at position 672, 480 images are left out" in said
    for number, fault in enumerate(faults):
        env = {"VITSCALE_FAULT": f"kill@{fault}"}
        codes = start("pretrain", *arguments(stormy, data, stage), said=tmp_path / f"{number}.txt", world=2, env=env).wait(60)
        assert -9 in codes, codes
    run("pretrain", *arguments(stormy, data, stage), said=tmp_path / "last.txt", world=2)

    for directory in (quiet, stormy):
        state = newest_valid(directory / "checkpoints")[1]["state"]
        assert state["segments"] == [BACK] and state["position"] == BACK["to_position"] + 7 * BATCH
        assert state["images_seen"] == 9 * BATCH and state["skipped"] == 0 and state["bad_steps"] == []
        # Each step once; what was shown is what the order has at the positions that are left.
        assert [step for step, _ in curve(directory, "loss")] == list(range(1, 10))
        positions = [*range(0, 2 * BATCH, BATCH), *range(BACK["to_position"], BACK["to_position"] + 7 * BATCH, BATCH)]
        assert [found for _, found in curve(directory, "samples_hash")] == hashes_of(directory, data, positions)
        (event,) = events(directory, "rollback")
        assert {name: event[name] for name in BACK} == BACK and events(directory, "skipped_step") == []
        assert [(skip["step"], skip["why"], skip["loss"]) for skip in event["skipped"]] == [
            (step, "loss", "nan") for step in BAD
        ]
    assert curve(stormy, *NAMES) == curve(quiet, *NAMES) and weights(stormy) == weights(quiet)
    assert [path.name for path in candidates(stormy / "checkpoints")] == [f"step-{step:08d}" for step in (9, 8, 6)]


def test_a_rollback_over_a_change_of_image_size_goes_on_with_one_rank(tmp_path, data):
    """Sizes belong to steps, not to positions: the steps that are taken again have theirs, on any number of ranks."""
    quiet, stormy = tmp_path / "quiet", tmp_path / "stormy"
    more = ['train.resolutions=["4@0","6@4","8@7"]']
    run("pretrain", *arguments(quiet, data, 2, *more), said=tmp_path / "quiet.txt", world=2)
    env = {"VITSCALE_FAULT": "kill@rollback.recorded"}
    assert -9 in start("pretrain", *arguments(stormy, data, 2, *more), said=tmp_path / "a.txt", world=2, env=env).wait(60)
    run("pretrain", *arguments(stormy, data, 3, *more), said=tmp_path / "b.txt")
    assert newest_valid(stormy / "checkpoints")[1]["state"]["segments"] == [BACK]
    names = ("image_size", "samples_hash", "images_seen", "skipped")
    assert curve(stormy, *names) == curve(quiet, *names)
    assert [size for _, size in curve(stormy, "image_size")] == [4] * 4 + [6] * 3 + [8] * 2
    losses = [np.array([loss for _, loss in curve(directory, "loss")]) for directory in (stormy, quiet)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_a_run_told_to_skip_what_went_bad_ends_with_the_same_bits(tmp_path, data):
    """And where the run may not go back, it goes on."""
    bad, told = tmp_path / "bad", tmp_path / "told"
    run("pretrain", *arguments(bad, data, 2, "train.rollback_skips=0"), said=tmp_path / "bad.txt")
    more = ["train.skip_steps=[4, 5, 6]", "train.rollback_skips=0"]
    run("pretrain", *arguments(told, data, 2, *more), said=tmp_path / "told.txt")
    names = ("loss", "lr", "samples_hash", "skipped")
    lines = [[line for line in curve(directory, *names) if line[0] not in BAD] for directory in (bad, told)]
    assert lines[0] == lines[1] and lines[0][-1][-1] == 3 and weights(bad) == weights(told)
    assert [line for line in curve(bad, "loss") if line[0] in BAD] == [(step, "nan") for step in BAD]
    skips = [events(directory, "skipped_step") for directory in (bad, told)]
    assert [[(skip["step"], skip["why"]) for skip in found] for found in skips] == [
        [(step, why) for step in BAD] for why in ("loss", "told")
    ]
    for skip in skips[0]:
        (shards,) = skip["images"].values()
        assert (skip["first_position"], skip["end_position"]) == ((skip["step"] - 1) * BATCH, skip["step"] * BATCH)
        assert sum(map(len, shards.values())) == BATCH and skips[0] != skips[1]
        assert hashes_of(bad, data, [skip["first_position"]]) == [dict(curve(bad, "samples_hash"))[skip["step"]]]


def test_past_its_rollbacks_or_without_a_checkpoint_a_run_has_diverged(tmp_path, data, bad_batches):
    bad_batches |= {8, 9, 11}
    directory = tmp_path / "r"
    said = run("pretrain", *arguments(directory, data, 1, "train.rollbacks_max=1"), said=tmp_path / "a.txt", code=79)
    assert "error: steps 3, 4, 6 went bad" in said and "after 1 rollbacks" in said and "Traceback" not in said
    assert [line["to_position"] for line in events(directory, "rollback")] == [BACK["to_position"]]
    assert [skip["step"] for skip in events(directory, "skipped_step")] == [3, 4, 6]
    said = run("pretrain", *arguments(directory, data, 1, "train.rollbacks_max=1"), said=tmp_path / "b.txt", code=79)
    assert "continuing after step 4" in said and "error: steps 3, 4, 6 went bad" in said
    bad_batches |= {2}
    said = run("pretrain", *arguments(tmp_path / "early", data, 1, "train.rollback_skips=1"), said=tmp_path / "c.txt", code=79)
    assert "error: steps 2 went bad" in said and "no valid checkpoint is older than step 2" in said


def test_two_rollbacks_to_one_checkpoint_add_up(tmp_path, data, bad_batches):
    bad_batches |= {8, 9, 11}
    directory = tmp_path / "r"
    env = {"VITSCALE_FAULT": "kill@rollback.recorded:step=6"}
    start("pretrain", *arguments(directory, data, 1), said=tmp_path / "a.txt", env=env).wait(60)
    run("pretrain", *arguments(directory, data, 1), said=tmp_path / "b.txt")
    state = newest_valid(directory / "checkpoints")[1]["state"]
    again = {"rollback_at_step": 6, "to_step": 2, "from_position": 7 * BATCH, "to_position": 12 * BATCH}
    assert state["segments"] == [BACK, again] and state["position"] == 19 * BATCH
    assert [{name: event[name] for name in BACK} for event in events(directory, "rollback")] == [BACK, again]
    positions = [*range(0, 2 * BATCH, BATCH), *range(12 * BATCH, 19 * BATCH, BATCH)]
    assert [found for _, found in curve(directory, "samples_hash")] == hashes_of(directory, data, positions)


def test_a_corrupt_replica_ends_the_run_names_its_rank_and_the_same_command_goes_on(tmp_path, data, bad_batches, monkeypatch):
    bad_batches.clear()
    struck = tmp_path / "struck"
    marker, plain = tmp_path / "flipped", Objective.__call__

    def objective(self: Objective, forward: Any, *batch: Any, **slot: int) -> Loss:
        if slot["step"] == 4 and forward.rank == 1 and not marker.exists():
            marker.touch()
            forward.module.head.weight.data.view(torch.int32).view(-1)[5] ^= 1 << 20
        return plain(self, forward, *batch, **slot)

    monkeypatch.setattr(Objective, "__call__", objective)
    command = ("pretrain", *arguments(struck, data, 2, "train.length=6"))
    env = {"VITSCALE_FAULT": "slow@checkpoint.files:step=4:seconds=2"}  # on its way when the flip is found
    said = run(*command, said=tmp_path / "a.txt", world=2, code=75, env=env)
    assert "error: at step 5 the copies of head.weight are not equal on all ranks, and rank 1 on " in said
    assert [path.name for path in candidates(struck / "checkpoints")] == ["step-00000004", "step-00000002"]
    said = run(*command, said=tmp_path / "b.txt", world=2)
    assert "continuing after step 4" in said
    (event,) = events(struck, "corrupt")
    assert event["step"] == 5 and [(found["tensor"], found["ranks"]) for found in event["tensors"]] == [("head.weight", [1])]
    assert [step for step, _ in curve(struck, "loss")] == list(range(1, 7))
