"""The ranks of one build: processes on any number of machines that share nothing but the directory of the build.

start   one launch of all ranks; rank 0 shows that it is alive in DIR/.build/start.json, the others join when they see it
claim   an empty file that one rank of this start creates, and so owns the task of its name: DIR/.build/claims-TOKEN/NAME

No rank waits for another but for the results of its tasks, and every result is a file that appears whole. Claims end
with their start: what a killed rank had claimed is free for the next start.
"""

import contextlib
import fcntl
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vitscale.base.cluster import Cluster
from vitscale.base.errors import EnvironmentFault, TransientFault
from vitscale.base.files import read_json, temporary_beside

START = "start.json"
BEAT_S = 1.0
LOOK_S = 0.2
SAY_EVERY_S = 60.0
PATIENCE_S = 1800.0
"""The longest task without a sign of life: 4,096 images of 24 M pixels take one core about ten minutes, three times that
on a crowded machine. Launchers end all ranks within seconds when one dies; this is for those that do not."""


class Team:
    """This process among the ranks of a build."""

    def __init__(self, *, rank: int = 0, world: int = 1, patience_s: float = PATIENCE_S) -> None:
        self.rank = rank
        self.world = world
        self._patience_s = patience_s
        self._work = Path()
        self._is_in = False
        self._token = secrets.token_hex(8)

    @classmethod
    def of(cls, cluster: Cluster) -> "Team":
        return cls(rank=cluster.rank, world=cluster.world)

    @contextmanager
    def leading(self, work: Path, about: Any) -> Iterator[Callable[[], None]]:
        """Rank 0: hold the directory against other builds. Calling the given function lets the other ranks join.

        `about` is what must be equal for a rank to join. Raises EnvironmentFault when another build is at work.
        """
        work.mkdir(parents=True, exist_ok=True)
        self._work, self._is_in = work, True
        is_open, is_ended = threading.Event(), threading.Event()
        with open(work / "lock", "ab") as lock:
            self._lock(lock.fileno(), fcntl.LOCK_EX)
            if self.world > 1:
                threading.Thread(target=self._beat, args=(about, is_open, is_ended), daemon=True).start()

            def open_the_door() -> None:
                self._claims.mkdir(exist_ok=True)
                fcntl.flock(lock.fileno(), fcntl.LOCK_SH)
                is_open.set()

            try:
                yield open_the_door
            finally:
                is_ended.set()

    @contextmanager
    def joining(self, work: Path, about: Any, *, is_over: Callable[[], bool]) -> Iterator[bool]:
        """Another rank: wait until rank 0 lets it in; False when the build is over already."""
        self._work = work
        seen = first = self._look_for(about)  # an earlier start may have left it; only a beat after this one is alive

        def has_begun() -> bool:
            nonlocal seen
            seen = self._look_for(about)
            return is_over() or (seen not in (None, first) and seen["is_open"])

        self.wait(has_begun, for_what=lambda: "rank 0 to list the inputs", moved=lambda: seen)
        if is_over():
            yield False
            return
        self._token, self._is_in = seen["token"], True
        with open(work / "lock", "ab") as lock:
            self._lock(lock.fileno(), fcntl.LOCK_SH)
            yield True

    def claim(self, task: str) -> bool:
        """Whether this rank, and no other of this start, is to do the task."""
        if self.world == 1:
            return True
        try:
            with open(self._claims / task, "x") as file:
                file.write(str(self.rank))
        except (FileExistsError, FileNotFoundError):  # not found: the build is complete, its workshop gone
            return False
        return True

    def report(self, task: str) -> None:
        """Tell the others that a claimed task is done."""
        if self.world > 1:
            with contextlib.suppress(FileNotFoundError):  # the build is complete, its workshop gone
                self._done(task).touch()

    def wait_for_tasks(self, tasks: Sequence[str], *, is_over: Callable[[], bool] = lambda: False) -> None:
        """Wait until all tasks of this start are reported. Raises as wait_for_files."""
        if self.world > 1:
            self.wait_for_files([self._done(task) for task in tasks], is_over=is_over)

    def wait_for_files(self, paths: Sequence[Path], *, is_over: Callable[[], bool] = lambda: False) -> None:
        """Wait until all these results exist, or the build is over.

        Raises TransientFault that names a missing one when none has come for a long while.
        """
        missing = list(paths)

        def are_there() -> bool:
            missing[:] = [path for path in missing if not path.exists()]
            return not missing or is_over()

        def in_words() -> str:
            name = missing[0].name.partition(".")[0]
            return f"{len(missing):,} results of other ranks, first {name} (claimed by {self._owner(name)})"

        self.wait(are_there, for_what=in_words, moved=lambda: len(missing))

    def wait(self, is_done: Callable[[], bool], *, for_what: Callable[[], str], moved: Callable[[], Any]) -> None:
        """Look until `is_done`; say aloud what for; TransientFault when `moved` has not changed for the patience."""
        moved_at_s = said_at_s = time.monotonic()
        before = moved()
        while not is_done():
            if self._is_in and not self._work.exists():
                if is_done():
                    return
                raise TransientFault(f"the build in {self._work.parent} was ended by another rank, which says why")
            time.sleep(LOOK_S)
            now_s = time.monotonic()
            if (now := moved()) != before:
                before, moved_at_s = now, now_s
            if now_s - said_at_s > SAY_EVERY_S:
                said_at_s = now_s
                print(f"rank {self.rank} waits for {for_what()}", file=sys.stderr, flush=True)
            if now_s - moved_at_s > self._patience_s:
                raise TransientFault(
                    f"rank {self.rank} waited {self._patience_s:.0f} s for {for_what()} and nothing moved; "
                    "see what became of the others, then run the same command again to continue"
                )

    @property
    def _claims(self) -> Path:
        return self._work / f"claims-{self._token}"

    def _done(self, task: str) -> Path:
        return self._claims / f"{task}.done"

    def _owner(self, task: str) -> str:
        try:
            return f"rank {(self._claims / task).read_text()}"
        except OSError:
            return "no rank"

    def _lock(self, descriptor: int, kind: int) -> None:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EnvironmentFault(
                f"another build is at work in {self._work.parent}; wait for it, or choose another --out"
            ) from None

    def _look_for(self, about: Any) -> Any:
        """What rank 0 shows; None while there is none, or that of another build."""
        try:
            seen = read_json(self._work / START)
        except EnvironmentFault:
            return None
        return seen if seen["about"] == about else None

    def _beat(self, about: Any, is_open: threading.Event, is_ended: threading.Event) -> None:
        """Write a growing number. Not flushed to the device: it is for those who look now."""
        beat = 0
        with temporary_beside(self._work / START) as temporary:
            while not is_ended.is_set():
                said = {"token": self._token, "about": about, "is_open": is_open.is_set(), "beat": beat}
                try:
                    temporary.write_text(json.dumps(said))
                    os.replace(temporary, self._work / START)
                except FileNotFoundError:
                    return  # another rank has completed the build
                beat += 1
                (is_ended if is_open.is_set() else is_open).wait(BEAT_S)
