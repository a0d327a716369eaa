"""A branch: a new run that takes up the whole state of another one at a step, to end otherwise. `pretrain.py --from RUN@STEP`.

Weights, optimizer, averages, step and data position go on where they stood, so a cool-down of a run that stayed at a high rate
costs its own steps only, and equals the run that had planned it. What may change: schedule, length, rates, decay, data and its
weights, augmentation, objective, cadence, machine.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from vitscale.base.errors import EnvironmentFault, UsageError
from vitscale.base.files import sha256_bytes
from vitscale.config import Config, from_record
from vitscale.training.checkpoint import RECORD, TrainState, candidates, checked, directory_name, load_checkpoint, read_record
from vitscale.training.engine import Engine
from vitscale.training.rundir import CONFIG, differences

FREE_OF_LOSS = ("train.length", "train.skip_", "train.spike_", "train.rollback", "train.init_sha256", "data.eval_")
"""Beginnings of keys among train, data and augment that change no loss of a given batch."""
FIXED = ("optim.optimizer", "optim.moment_dtype", "train.precision", "train.ema")
"""Besides the model: what the state is made of."""


@dataclass(frozen=True, kw_only=True)
class Parent:
    """Where a branch starts."""

    step_directory: Path
    config: Config
    """Of the parent's run."""
    name: str
    """RUN@STEP, absolute."""
    sha256: str
    """Of the record of the checkpoint, which names every file by its own."""


def find_parent(text: str) -> Parent:
    """The parent by RUN@STEP, or RUN for its newest checkpoint. Reads names and the record; files are hashed at the start.

    Raises EnvironmentFault when there is no such run or checkpoint, UsageError for what is no RUN@STEP.
    """
    name, at, step = text.partition("@")
    run = Path(name).resolve()
    if not (run / CONFIG).is_file():
        raise EnvironmentFault(f"--from: expected a run directory at {name}, found no {CONFIG} there")
    checkpoints = run / "checkpoints"
    found = candidates(checkpoints)
    if at and not step.isdigit():
        raise UsageError(f"--from: expected RUN@STEP with a number behind @, got {text!r}")
    path = checkpoints / directory_name(int(step)) if at else next(iter(found), None)
    if path is None or path not in found:
        there = ", ".join(str(int(other.name.removeprefix("step-"))) for other in reversed(found)) or "none"
        raise EnvironmentFault(f"--from: {name} has no checkpoint of step {step or 'any'}; there are: {there}")
    complaint, record = read_record(path)
    if complaint is not None:
        raise EnvironmentFault(f"--from: {path} is not usable: {complaint}")
    return Parent(
        step_directory=path,
        config=from_record(json.loads((run / CONFIG).read_text()), origin=str(run / CONFIG)),
        name=f"{run}@{record['state']['step']}",
        sha256=sha256_bytes((path / RECORD).read_bytes()),
    )


def is_same_parent(text: str, name: str) -> bool:
    """Whether RUN@STEP, or RUN for whatever step, names the parent of a stored branch. The parent itself may be gone."""
    run, at, step = text.partition("@")
    known_run, _, known_step = name.rpartition("@")
    return str(Path(run).resolve()) == known_run and (not at or step.lstrip("0") == known_step)


def require_same_state(parent: Parent, config: Config) -> None:
    """Raise UsageError where the branch wants another model or optimizer than its parent's state is of."""
    changed = [d for d in differences(parent.config, config) if d.key.startswith("model.") or d.key in FIXED]
    if changed:
        named = "; ".join(f"{d.key} is {d.stored!r} there, {d.wanted!r} in the command" for d in changed)
        raise UsageError(
            f"a branch goes on with the state of {parent.name}, so the model and what its optimizer keeps must be the same: "
            f"{named}; leave them, or start from the weights alone with launch/finetune.py --from"
        )


def has_same_losses(before: Config, now: Config) -> bool:
    """Whether the same weights would have the same loss under both. Pure."""
    return not any(
        d.kind == "result" and d.key.startswith(("train.", "data.", "augment.")) and not d.key.startswith(FREE_OF_LOSS)
        for d in differences(before, now)
    )


def load_parent(engine: Engine, parent: Parent, config: Config) -> TrainState:
    """The parent's state, loaded into the engine, with the branch noted in its segments. Collective.

    Where the branch has another objective or other data, losses of the parent are no measure for its own (guard.py).
    """
    complaint, saved = checked(parent.step_directory)
    if saved is None:
        raise EnvironmentFault(f"--from: {parent.step_directory} is not usable: {complaint}")
    state = load_checkpoint(engine, saved)
    if not has_same_losses(parent.config, config):
        state.accepted_losses = []
    return replace(state, segments=[*state.segments, {"branch_step": state.step, "position": state.position}])
