"""Going back when steps went bad together (guard.py): to a checkpoint older than the first of them, and on with other data.

RUN/rollbacks.json    the rollbacks that count, oldest first, written before anything else changes

A rollback to step S moves the position: what lies between the position of the checkpoint and the end of the last bad step,
and train.rollback_jump global batches more, is left out. TrainState.segments notes it, but the checkpoint of step S is older
than that, and a kill may come before the next one is saved. So the record lies in the file, and whoever restores step S at
the position where a record begins takes its jump: at the rollback and at every later start alike. Several records may begin
at one step, each where the one before ended. Checkpoints of later steps that do not know of a record belong to what was given
up; they are deleted, at once and again at every start. A run that stands before the step of a record, because the
checkpoint there was damaged, has that record's cause still before it, and forgets it.
"""

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vitscale.base.errors import DivergedError
from vitscale.base.faults import fault_point
from vitscale.base.files import read_json, write_json
from vitscale.config import TrainConfig
from vitscale.training.checkpoint import (
    Saved,
    TrainState,
    candidates,
    checked,
    kept_for_ever,
    load_checkpoint,
    put_aside,
    read_record,
)
from vitscale.training.collectives import barrier, from_rank_zero
from vitscale.training.engine import Engine
from vitscale.training.guard import RollBack
from vitscale.training.metrics import Metrics, read_lines

ROLLBACKS = "rollbacks.json"
SEGMENT = ("rollback_at_step", "to_step", "from_position", "to_position")
"""What TrainState.segments keeps of a record; the record also holds the events of the skipped steps."""

Record = dict[str, Any]


def segment_of(record: Record) -> dict[str, int]:
    return {name: record[name] for name in SEGMENT}


def jumped(state: TrainState, records: Sequence[Record]) -> TrainState:
    """The state after all jumps that begin exactly where it stands. Pure."""
    for record in records:
        if (record["to_step"], record["from_position"]) == (state.step, state.position):
            segments = [*state.segments, segment_of(record)]
            state = dataclasses.replace(state, position=record["to_position"], segments=segments)
    return state


def is_given_up(state: dict[str, Any], records: Sequence[Record]) -> bool:
    """Whether a checkpoint of this state (as in its vitscale.json) was saved by what a rollback has undone. Pure."""
    return any(record["to_step"] < state["step"] and segment_of(record) not in state["segments"] for record in records)


def read_rollbacks(run: Path) -> list[Record]:
    path = run / ROLLBACKS
    return read_json(path) if path.is_file() else []


def finish_rollbacks(run: Path, *, rank: int) -> None:
    """Delete the checkpoints of what was given up, in case a kill came first. Before a start looks for its own. Collective."""
    if rank == 0 and (records := read_rollbacks(run)):
        for path in candidates(run / "checkpoints"):
            complaint, record = read_record(path)
            if complaint is None and is_given_up(record["state"], records):
                _give_up(path)
    barrier()


def taken_up(run: Path, state: TrainState, *, rank: int) -> tuple[TrainState, list[Record]]:
    """What a start that has restored `state` goes on from, and the records that count from there on. Collective."""
    records: list[Record] = []
    if rank == 0:
        known = read_rollbacks(run)
        records = [record for record in known if record["to_step"] <= state.step]
        if records != known:
            write_json(run / ROLLBACKS, records)
    records = from_rank_zero(records)
    return jumped(state, records), records


def roll_back(
    engine: Engine, run: Path, wanted: RollBack, *, train: TrainConfig, global_batch: int, say: Callable[[str], None]
) -> tuple[TrainState, list[Record]]:
    """Restore the newest valid checkpoint that is older than the first bad step; where the run goes on, and the records.

    Raises DivergedError when the run has gone back train.rollbacks_max times, or has nothing to go back to. Collective.
    """
    bad = wanted.state.bad_steps
    known: list[Record] = from_rank_zero(read_rollbacks(run) if engine.rank == 0 else None)
    cause = f"steps {', '.join(map(str, bad))} went bad (non-finite numbers or loss spikes, see events.jsonl)"
    if len(known) >= train.rollbacks_max:
        raise DivergedError(
            f"{cause} after {len(known)} rollbacks, and train.rollbacks_max={train.rollbacks_max} allows no more; look at the "
            "images that events.jsonl names, or branch from an older checkpoint with a lower optim.peak_lr"
        )
    saved = newest_before(bad[0], run / "checkpoints", rank=engine.rank, say=say)
    if saved is None:
        raise DivergedError(
            f"{cause}, and no valid checkpoint is older than step {bad[0]}; lower optim.peak_lr, or set run.save_every so that "
            "there is one, or train.rollback_skips=0 to go on regardless"
        )
    kept = [record for record in known if record["to_step"] <= saved.state.step]
    record = {
        "rollback_at_step": wanted.state.step,
        "to_step": saved.state.step,
        "from_position": jumped(saved.state, kept).position,
        "to_position": wanted.state.position + train.rollback_jump * global_batch,
    }
    if engine.rank == 0:
        events = read_lines(run / "events.jsonl")
        skipped = [event for event in events if event["event"] == "skipped_step" and event["step"] in bad]
        write_json(run / ROLLBACKS, [*kept, {**record, "skipped": skipped}])
        fault_point("rollback.recorded", rank=0, step=wanted.state.step)
        for path in candidates(run / "checkpoints"):
            if int(path.name.removeprefix("step-")) > saved.state.step:
                _give_up(path)
    barrier()
    fault_point("rollback.deleted", rank=engine.rank, step=wanted.state.step)
    return taken_up(run, load_checkpoint(engine, saved), rank=engine.rank)


def tell(metrics: Metrics, records: Sequence[Record]) -> None:
    """Write the event of each record that events.jsonl does not have yet. Rank 0."""
    told = [segment_of(event) for event in read_lines(metrics.events_path) if event["event"] == "rollback"]
    for record in records:
        if segment_of(record) not in told:
            metrics.log_events([{"step": record["rollback_at_step"], "event": "rollback", **record}])
            metrics.say(
                f"rolled back from step {record['rollback_at_step']} to step {record['to_step']}; the data goes on at position "
                f"{record['to_position']:,}, {record['to_position'] - record['from_position']:,} images are left out"
            )


def newest_before(step: int, checkpoints: Path, *, rank: int, say: Callable[[str], None]) -> Saved | None:
    """The newest valid checkpoint of an earlier step; those that are not valid are named. Collective."""
    paths: list[Path] = from_rank_zero(candidates(checkpoints) if rank == 0 else None)
    for path in paths:
        if int(path.name.removeprefix("step-")) >= step:
            continue
        complaint, saved = checked(path)
        if saved is not None:
            return saved
        if rank == 0:
            say(f"checkpoint {path.name} is not usable to roll back to: {complaint}")
    return None


def _give_up(path: Path) -> None:
    """Delete a step directory, or put it aside where a .keep file protects it."""
    if path.name in kept_for_ever(path.parent):
        put_aside(path)
    else:
        # Renamed first: a kill in mid-deletion must not leave half a checkpoint under a good name.
        shutil.rmtree(path.rename(path.with_name(path.name + ".partial")))
