"""Write checkpoints while training goes on, and commit each when all ranks have written theirs.

    main thread, all ranks       copy to host memory (the only time training stands still)
    background thread            rank 0 clears every old .partial and makes the new one | all write, flush, hash
      of each rank               | all tell whether it went well | rank 0 writes vitscale.json, renames, replaces `latest`

At each | the threads meet in a process group of their own. Whatever fails on any rank, the checkpoint before stays the
newest: the failure is reported, training goes on and the next save that is due is tried. A synchronous save is the same,
waited for.
"""

import errno
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from vitscale.base.errors import TransientFault
from vitscale.base.faults import fault_point
from vitscale.base.files import canonical_json, fsync_path, naming, publish, sha256_file, write_bytes, write_json
from vitscale.planning.cadence import steps_between_saves
from vitscale.training.checkpoint import (
    RECORD,
    SCHEMA_VERSION,
    TrainState,
    candidates,
    directory_name,
    kept_for_ever,
    put_aside,
    sealed,
    to_delete,
)
from vitscale.training.collectives import from_all_ranks, from_rank_zero, new_control_group
from vitscale.training.engine import RECOVERY_SCRIPT, Engine, versions
from vitscale.training.partitions import averages_name, partition_map
from vitscale.training.staging import HostMemory
from vitscale.weights.tensors import save_tensors

MAP = "partition-{:05d}.json"
THREAD = "saver"
"""Name of the thread that writes."""
FLUSH_TIMEOUT = timedelta(days=1)
"""Of the threads that write: a rank that is through waits for the slowest, and a slow disk is no fault."""
FIRST_SAVE_AFTER_STEPS = 10
"""With run.save_every=auto, of every start."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one save; equal on all ranks but for the times."""

    step: int
    complaint: str | None
    """Why there is no checkpoint of this step; None: it is committed."""
    blocked_s: float
    """How long training stood still on this rank."""
    flush_s: float
    """How long writing and committing took beside it."""
    bytes: int
    """Of all files."""


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which checkpoints stay: the newest `last`, those at a multiple of `every` steps (0: none), those with a .keep file."""

    last: int
    every: int = 0


class Saver:
    """The one writer of a run's checkpoints. Every method but `poll` is collective."""

    def __init__(
        self,
        engine: Engine,
        checkpoints: Path,
        *,
        data: dict[str, Any],
        retention: Retention,
        start_step: int = 0,
        between_failures_s: float | None = None,
        check: Callable[[int], None] = lambda step: None,
        told: Callable[[Outcome], None] = lambda outcome: None,
        may_commit: Callable[[], bool] = lambda: True,
        beat: Callable[[str], None] = lambda phase: None,
    ) -> None:
        """`data`: what fixes the order of the images. `between_failures_s`: saves are due where they lose the least time
        (planning/cadence.py), the first soon after `start_step`, to learn what one costs and that it works. `check` is
        called with the step before anything is copied, and raises where the state must not be kept. `told` hears of every
        save, on every rank. `may_commit` is asked on rank 0 right before the rename: False where another start has taken
        over the run. `beat` is told what the main thread does: "save" while it copies, "flush" while it waits for files."""
        self._engine = engine
        self._checkpoints = checkpoints
        self._data = data
        self._retention = retention
        self._check = check
        self._told = told
        self._may_commit = may_commit
        self._beat = beat
        self._memory = HostMemory()
        self._group = new_control_group(FLUSH_TIMEOUT)
        self._thread: threading.Thread | None = None
        self._outcome: Outcome | None = None
        self._defect: BaseException | None = None
        self._between_failures_s = between_failures_s
        self._due_step = None if between_failures_s is None else start_step + FIRST_SAVE_AFTER_STEPS
        self._last_step, self._last_at_s = start_step, time.perf_counter()
        self._blocked_s = self._flush_s = 0.0  # of the last save, on this rank

    def is_due(self, step: int) -> bool:
        """Whether a save is due by the cost of saves and the rate of failures; the same on all ranks."""
        return self._due_step is not None and step >= self._due_step

    def _plan_next(self, step: int) -> None:
        """Set when the next save is due, as rank 0 has measured it. Collective."""
        now_s = time.perf_counter()
        step_s = (now_s - self._last_at_s - self._blocked_s) / max(1, step - self._last_step)
        self._last_step, self._last_at_s = step, now_s
        if self._between_failures_s is not None:
            ahead = steps_between_saves(
                max(step_s, 1e-4), cost_s=self._blocked_s, flush_s=self._flush_s, between_failures_s=self._between_failures_s
            )
            self._due_step = step + from_rank_zero(ahead)

    def begin(self, state: TrainState) -> None:
        """Copy the state and let it be written; waits for an earlier save that is not done yet."""
        self.wait()
        self._beat("save")
        self._check(state.step)
        started_at_s = time.perf_counter()
        engine, step = self._engine, state.step
        fault_point("checkpoint.begin", rank=engine.rank, step=step)
        partial = self._checkpoints / f"{directory_name(step)}.partial"
        files = engine.stage_files(self._checkpoints, partial.name)
        averages = engine.averages.tensors() if engine.averages_of == engine.rank else {}
        staged_files, staged_averages = self._memory.staged((files, averages))
        record = {
            "schema_version": SCHEMA_VERSION,
            "state": asdict(deepcopy(state)),
            "data": self._data,
            "world": engine.world,
            "zero_stage": engine.ds.stage,
            "ema": list(engine.averages.decays),
            "loss_scaler": engine.loss_scaler(),
            "versions": versions(),
        }
        writers: dict[str, Callable[[Path], None]] = {}
        for name, content in staged_files:
            writers[name] = _torch_writer(content)
        writers[MAP.format(engine.rank)] = _json_writer(partition_map(engine))
        if staged_averages:
            writers[averages_name(engine.rank)] = _tensors_writer(staged_averages)
        fault_point("checkpoint.staged", rank=engine.rank, step=step)
        self._blocked_s = time.perf_counter() - started_at_s
        self._plan_next(step)
        self._thread = threading.Thread(target=self._flush, args=(partial, writers, record), name=THREAD, daemon=True)
        self._thread.start()

    @property
    def is_writing(self) -> bool:
        """Whether a save is on its way to the disk on this rank."""
        return self._thread is not None and self._thread.is_alive()

    def poll(self) -> None:
        """Tell of a save that has ended meanwhile. Not collective."""
        if self._thread is not None and not self.is_writing:
            self._settle()

    def wait(self, *, required: bool = False) -> None:
        """Wait for the save that is being written. With `required`, raises TransientFault when the last one failed."""
        if self._thread is not None:
            self._beat("flush")
            self._settle()
        if required and self._outcome is not None and self._outcome.complaint is not None:
            raise TransientFault(
                f"the last checkpoint, of step {self._outcome.step}, could not be saved: {self._outcome.complaint}; "
                "mend that and start the same command again, it continues from the checkpoint before"
            )

    def _settle(self) -> None:
        assert self._thread is not None
        self._thread.join()
        self._thread = None
        if self._defect is not None:
            raise self._defect
        if self._outcome is not None:
            self._told(self._outcome)

    # ---- in the background ----------------------------------------------------------------------------------------

    def _flush(self, partial: Path, writers: dict[str, Callable[[Path], None]], record: dict[str, Any]) -> None:
        started_at_s = time.perf_counter()
        rank, step = self._engine.rank, record["state"]["step"]
        size = 0
        try:
            complaint = from_rank_zero(self._attempt(lambda: self._prepare(partial)) if rank == 0 else None, self._group)
            if complaint is None:
                mine: list[dict[str, Any]] = []
                complaint = self._attempt(lambda: mine.extend(self._write(partial, writers, step)))
                answers = from_all_ranks((complaint, mine), self._group)
                complaint = next((said for said, _ in answers if said), None)
                entries = sorted((entry for _, files in answers for entry in files), key=lambda entry: entry["name"])
                size = sum(entry["bytes"] for entry in entries)
                if complaint is None:
                    if rank == 0:
                        complaint = self._attempt(lambda: self._commit(partial, {**record, "files": entries}))
                    complaint = from_rank_zero(complaint, self._group)
            if complaint is not None and rank == 0:
                shutil.rmtree(partial, ignore_errors=True)  # it may hold the room that is missing
        except BaseException as error:
            self._defect = self._defect or error
            return
        self._flush_s = time.perf_counter() - started_at_s
        self._outcome = Outcome(step=step, complaint=complaint, blocked_s=self._blocked_s, flush_s=self._flush_s, bytes=size)

    def _attempt(self, action: Callable[[], None]) -> str | None:
        """What went wrong, in words for the other ranks; None where nothing did."""
        try:
            action()
        except OSError as error:
            return (
                f"rank {self._engine.rank}: {error.strerror} ({errno.errorcode.get(error.errno or 0, '?')}) at {error.filename}"
            )
        except Exception as error:
            self._defect = error
            return f"rank {self._engine.rank}: {error!r}"
        return None

    def _prepare(self, partial: Path) -> None:
        self._checkpoints.mkdir(parents=True, exist_ok=True)
        _delete_partial(self._checkpoints)
        partial.mkdir()
        if self._engine.ds.stage > 0 and not (self._checkpoints / RECOVERY_SCRIPT.name).exists():
            write_bytes(self._checkpoints / RECOVERY_SCRIPT.name, RECOVERY_SCRIPT.read_bytes())

    def _write(self, partial: Path, writers: dict[str, Callable[[Path], None]], step: int) -> list[dict[str, Any]]:
        for name, write in writers.items():
            with naming(partial / name):
                write(partial / name)
        fault_point("checkpoint.files", rank=self._engine.rank, step=step)
        entries = []
        for name in writers:
            path = partial / name
            fsync_path(path)
            # Read back: what the record vouches for is what a reader will find.
            entries.append({"name": name, "bytes": path.stat().st_size, "sha256": sha256_file(path)})
        return entries

    def _commit(self, partial: Path, record: dict[str, Any]) -> None:
        step = record["state"]["step"]
        final = partial.with_suffix("")
        fault_point("checkpoint.commit", rank=0, step=step)
        write_json(partial / RECORD, sealed(record))
        fsync_path(partial)
        fault_point("checkpoint.rename", rank=0, step=step)
        if not self._may_commit():
            raise PermissionError(errno.EPERM, "another start has taken over this run", str(final))
        # Of this step already: a rollback came between. Under the name of a bad one, so that a kill right here leaves no
        # directory that looks as if nothing had ever been saved.
        former = put_aside(final) if final.exists() else None
        publish(partial, final)
        fault_point("checkpoint.latest", rank=0, step=step)
        # From here on the checkpoint exists: what fails now is no failure of the save.
        with suppress(OSError):
            if former is not None:
                shutil.rmtree(former)
        tidy(self._checkpoints, self._retention)


def tidy(checkpoints: Path, retention: Retention) -> None:
    """Let `latest` name the highest committed step, which must be a valid one, and delete what retention lets go.

    After each commit, and once at a start, for a commit that was killed before its end. What fails is left to the next.
    """
    with suppress(OSError):
        committed = candidates(checkpoints)
        write_bytes(checkpoints / "latest", committed[0].name.encode())
        kept = kept_for_ever(checkpoints)
        for path in to_delete(committed, keep_last=retention.last, keep_every=retention.every, kept=kept):
            # Renamed first: a kill in mid-deletion must not leave half a checkpoint under a good name.
            going = path.with_name(path.name + ".partial")
            publish(path, going)
            shutil.rmtree(going)
        _delete_partial(checkpoints)


def _delete_partial(checkpoints: Path) -> None:
    for leftover in checkpoints.glob("step-*.partial"):
        shutil.rmtree(leftover)


def _torch_writer(content: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        try:
            with open(path, "wb") as file:  # torch's own file has no errno for a full disk
                torch.save(content, file)
        except RuntimeError as error:
            # After a failed write torch still closes its archive, and complains of that instead.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise

    return write


def _json_writer(record: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(canonical_json(record))

    return write


def _tensors_writer(tensors: dict[str, torch.Tensor]) -> Callable[[Path], None]:
    return lambda path: save_tensors(path, tensors)


def save_checkpoint(engine: Engine, checkpoints: Path, *, state: TrainState, data: dict[str, Any], **retention: int) -> Path:
    """Write and commit one checkpoint, waited for; returns its directory. Collective. Raises TransientFault."""
    saver = Saver(engine, checkpoints, data=data, retention=Retention(**retention))
    saver.begin(state)
    saver.wait(required=True)
    return checkpoints / directory_name(state.step)
