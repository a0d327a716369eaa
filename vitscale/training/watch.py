"""Notice that a step does not end, name the rank it waits for, and end the run so that the same command can continue it.

The loop says where it is (`beat`: bookkeeping in this process, no file, no message). A thread looks. When nothing has moved
for `run.step_timeout` seconds the rank writes

RUN/stacks/attempt-NNN/rank-RRRRR.txt    where it is, its data workers, the Python stacks of its threads

The directory calls the others: a rank that finds it, and is in a step for half that time itself, writes its own file. After
a moment each rank that can still think reads all files and comes to the same verdict (verdict.py). One rank of each host says
it; one of all ranks adds it to events.jsonl and status.json. A late rank that wrote nothing is killed where it is on the same
host: it may be stopped, hear no other signal, and must not wake up later and write. All leave with exit code 75.

The thread needs nothing of the loop but the interpreter lock, which torch lets go of in collectives and waits. Where that
lock is never free, or a file system does not answer the thread, the C thread of faulthandler ends the process with the
stacks on stderr and exit code 1. A rank that is stopped altogether, and alone on its host, is killed by its guardian
(base/guardian.py). Both come later than an answer to the others would.

A rank of this host that dies is seen here too: under NCCL nothing else would tell the others for minutes.
A process that was stopped as a whole and goes on, as by Ctrl-Z and `fg`, counts anew.
"""

import contextlib
import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from vitscale.base import guardian
from vitscale.base.errors import ExitCode
from vitscale.base.files import publish, temporary_beside, write_json
from vitscale.base.host import is_alive, is_stopped, process_of
from vitscale.training.collectives import barrier
from vitscale.training.metrics import append_event
from vitscale.training.peers import Peer, dead_beside, first_alive_beside
from vitscale.training.saving import THREAD as SAVER
from vitscale.training.verdict import Report, read_reports, report_name, verdict_on

DEATH_GRACE_S = 3.0
"""A rank that ended in order ends before its peers have noticed; they get this long to come to the same end."""
ANSWER_S = (5.0, 60.0)
"""Least and most time for the files of the others: a tenth of the timeout. A client of NFS may see a new file late."""
FLUSH_FACTOR = 10
"""How many times longer than a step the files of a checkpoint may take that the loop waits for: a slow disk is no fault."""
STOPPED_TICKS = 10
"""A thread that comes this many looks late was not slow but stopped, and with it the loop."""


class Beats(Protocol):
    """What the loop tells where it is."""

    def beat(self, phase: str, *, step: int | None = None, micro_batch: int = 0) -> None: ...


class Unwatched:
    """Listens and does nothing."""

    def beat(self, phase: str, *, step: int | None = None, micro_batch: int = 0) -> None:
        pass


UNWATCHED = Unwatched()


class Watch:
    """The watch of one rank, from the first beat inside `with` to its end, which is collective unless by an error."""

    def __init__(
        self, run: Path, *, attempt: int, peers: tuple[Peer, ...], rank: int, timeout_s: float, workers: Callable[[], list[int]]
    ) -> None:
        """`timeout_s`=0: no watch. `workers` are the process ids of this rank's data workers now."""
        self._run = run
        self.directory = run / "stacks" / f"attempt-{attempt:03d}"
        self._peers, self._me = peers, peers[rank]
        self._timeout_s = timeout_s
        self._workers = workers
        self._place: tuple[str, int, int, float] | None = None  # one object: the thread never sees half a move
        self._step_since_s = 0.0
        self._died_at_s: dict[int, float] = {}
        self._tick_s = min(1.0, timeout_s / 20)
        self._answer_s = min(max(ANSWER_S[0], timeout_s / 10), ANSWER_S[1])
        self._closed = threading.Event()
        self._guardian: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None

    def beat(self, phase: str, *, step: int | None = None, micro_batch: int = 0) -> None:
        """The loop now enters a phase of a step (the last one if none is given)."""
        now_s, before = time.monotonic(), self._place
        if step is None:
            step = before[1] if before is not None else 0
        if before is None or step != before[1]:
            self._step_since_s = now_s
        self._place = (phase, step, micro_batch, now_s)

    @property
    def step(self) -> int:
        """The step the loop is in."""
        return self._place[1] if self._place is not None else 0

    def __enter__(self) -> "Watch":
        if self._timeout_s > 0:
            self.start()
        return self

    def start(self) -> None:
        """Begin to look; `with` does it."""
        patience_s = self._timeout_s + 2 * self._answer_s
        sentence = (
            f"error: {self._me.name} gave no sign of life for {patience_s:.0f} s (stopped, or its interpreter is held) and was "
            "killed; the same command continues"
        )
        command = [sys.executable, "-I", "-S", guardian.__file__, str(os.getpid()), str(patience_s), sentence]
        self._guardian = subprocess.Popen(command, stdin=subprocess.PIPE)
        assert self._guardian.stdin is not None
        os.set_blocking(self._guardian.stdin.fileno(), False)
        self._place = None
        self._closed.clear()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None and self._timeout_s > 0:
            barrier()  # a rank that is through and leaves must not be taken for a dead one
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        if self._guardian is not None:
            self._guardian.communicate(guardian.FAREWELL)

    # ---- the thread -------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        looked_at_s = time.monotonic()
        while not self._closed.wait(self._tick_s):
            self._give_signs_of_life()
            before_s, now_s = looked_at_s, time.monotonic()
            looked_at_s = now_s
            if self._place is None:
                continue
            if now_s - before_s > STOPPED_TICKS * self._tick_s:
                self.beat(self._place[0], step=self._place[1], micro_batch=self._place[2])
                continue
            self._look_for_the_dead()
            limit_s = self._timeout_s * (FLUSH_FACTOR if self._place[0] == "flush" else 1)
            is_called = now_s - self._step_since_s > self._timeout_s / 2 and self.directory.is_dir()
            if is_called or now_s - self._place[3] > limit_s:
                self._end_hung()

    def _give_signs_of_life(self) -> None:
        faulthandler.dump_traceback_later(self._timeout_s + 1.5 * self._answer_s, exit=True, file=2)
        assert self._guardian is not None and self._guardian.stdin is not None
        with contextlib.suppress(BrokenPipeError, BlockingIOError):  # without a guardian the rank goes on
            os.write(self._guardian.stdin.fileno(), guardian.SIGN_OF_LIFE)

    def _look_for_the_dead(self) -> None:
        now_s = time.monotonic()
        dead = dead_beside(self._peers, self._me)
        self._died_at_s = {peer.rank: self._died_at_s.get(peer.rank, now_s) for peer in dead}
        gone = [peer for peer in dead if now_s - self._died_at_s[peer.rank] > DEATH_GRACE_S]
        if gone:
            names = ", ".join(peer.name for peer in gone)
            sentence = f"{names} died in step {self.step}; the same command continues from the last checkpoint"
            is_speaker = self._me == first_alive_beside(self._peers, self._me)
            if is_speaker:
                self.note_dead(gone, sentence)
            self._leave(sentence, is_speaker=is_speaker)

    def note_dead(self, dead: Sequence[Peer], sentence: str) -> None:
        """Write down that ranks have ended, `dead` those that this host can name."""
        self._record("died", [peer.rank for peer in dead], step=self.step, sentence=sentence)

    def _end_hung(self) -> None:
        """Report, wait for the others, judge, clean up, leave."""
        report = self._report()
        try:
            self._write(report)
        except OSError as error:
            _say(f"{self._me.name} cannot write {self.directory} ({error}); its stacks follow")
            faulthandler.dump_traceback(file=2, all_threads=True)
        reports = self._wait_for_reports(report)
        verdict = verdict_on(reports, self._peers)
        for peer in self._peers:
            if peer.host == self._me.host and peer.rank not in reports and peer.process is not None and peer.is_alive():
                os.kill(peer.process.pid, signal.SIGKILL)
        for pid, state in report.workers:
            if state == "stopped":  # a child of this rank, so its number is still its own
                os.kill(pid, signal.SIGKILL)
        sentence = f"{verdict.sentence}; stacks of the ranks are in {self.directory}; the same command continues"
        if self._me.rank == verdict.writer:
            self._record("hung", verdict.late, step=report.step, sentence=sentence)
        self._leave(sentence, is_speaker=self._me.rank in verdict.speakers)

    def _report(self) -> Report:
        assert self._place is not None
        phase, step, micro_batch, since_s = self._place
        return Report(
            rank=self._me.rank,
            host=self._me.host,
            pid=os.getpid(),
            step=step,
            micro_batch=micro_batch,
            phase=phase,
            seconds=round(time.monotonic() - since_s, 1),
            waits_in=collective_of(SAVER if phase == "flush" else threading.main_thread().name),
            workers=tuple((pid, _state_of(pid)) for pid in self._workers()),
        )

    def _write(self, report: Report) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / report_name(self._me.rank)
        with temporary_beside(path) as temporary:
            with open(temporary, "w") as file:
                file.write(report.as_text())
                file.flush()
                faulthandler.dump_traceback(file=file, all_threads=True)
            publish(temporary, path)

    def _wait_for_reports(self, mine: Report) -> dict[int, Report]:
        deadline_s = time.monotonic() + self._answer_s
        while True:
            reports = {**read_reports(self.directory), mine.rank: mine}
            if len(reports) == len(self._peers) or time.monotonic() > deadline_s:
                return reports
            time.sleep(0.2)

    def _record(self, what: str, ranks: Sequence[int], *, step: int, sentence: str) -> None:
        """To events.jsonl and status.json: `what` is "hung" or "died"."""
        named = [{"rank": rank, "host": self._peers[rank].host} for rank in ranks]
        event: dict[str, Any] = {"step": step, {"hung": "late", "died": "dead"}[what]: named, "message": sentence}
        try:
            append_event(self._run, {"event": what, **event})
            write_json(self._run / "status.json", {"phase": what, **event, "at_unix_s": time.time()})
        except OSError as error:
            _say(f"{self._run} cannot be written ({error})")

    def _leave(self, sentence: str, *, is_speaker: bool) -> None:
        """End this process. Launchers kill the rest as soon as one has ended, so the silent ones wait for the speakers."""
        if is_speaker:
            _say(f"error: {sentence}")
        else:
            time.sleep(1.0)
        os._exit(ExitCode.TRANSIENT)


def _state_of(pid: int) -> str:
    process = process_of(pid)
    if process is None or not is_alive(process):
        return "dead"
    return "stopped" if is_stopped(process) else "alive"


def _say(sentence: str) -> None:
    """Past Python's stderr, whose lock the loop may hold."""
    os.write(2, f"{sentence}\n".encode())


def collective_of(thread_name: str) -> str:
    """Name of the collective in which a thread waits, by the Python stacks; empty where it is in none.

    On a GPU gradients are reduced in threads of autograd, which Python did not start: they count as that thread too.
    """
    started = (thread for thread in threading.enumerate() if not isinstance(thread, threading._DummyThread))
    others = {thread.ident for thread in started if thread.name != thread_name}
    for thread, innermost in sys._current_frames().items():
        frame = None if thread in others else innermost
        while frame is not None:
            code = frame.f_code
            if "/torch/distributed/distributed_c10d" in code.co_filename or "/deepspeed/comm/" in code.co_filename:
                return code.co_name
            frame = frame.f_back
    return ""
