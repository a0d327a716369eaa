"""Keep a training going under a scheduler or a shell, and end it with a checkpoint and an honest exit code.

    python launch/supervise.py RUN [--restarts N] -- deepspeed launch/pretrain.py --run RUN …

SIGTERM, SIGINT and SIGUSR1 become the file RUN/stop, which every rank obeys at the end of its step, however many launchers
are between: launchers kill, lose or swallow signals. The wrapper then waits for the checkpoint as long as it takes. When
the command has ended, what it left behind is given a minute and killed. Launchers also replace exit codes, so the code of
the wrapper is the one that RUN/FINISHED.json and RUN/status.json stand for:

0 finished   2, 3, 78, 79 as the program said   76 stopped with a checkpoint   75 killed or transient   else as it crashed

--restarts starts the command again after 75 and after a crash; 77 after three restarts without a new checkpoint.

Slurm, ten minutes of warning and requeued until it is finished:

    #SBATCH --signal=B:USR1@600 --requeue --open-mode=append
    python launch/supervise.py runs/l16 --restarts 20 -- deepspeed launch/pretrain.py --recipe augreg --run runs/l16 &
    trap 'kill -USR1 $!' USR1 TERM
    wait $!; wait $!; code=$?        # the first wait ends with the signal
    case $code in 75|76) scontrol requeue "$SLURM_JOB_ID" ;; esac
    exit $code
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch.arguments import Parser
from vitscale.base.errors import ExitCode, UsageError, run_main
from vitscale.base.host import descendants
from vitscale.base.progress import in_words

LEFTOVERS_S = 60.0
POLL_S = 0.2
FUTILE_RESTARTS = 3
PAUSE_MAX_S = 60.0
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_SAID_BY_THE_PROGRAM = (ExitCode.USAGE, ExitCode.ENVIRONMENT, ExitCode.NO_PROGRESS, ExitCode.BAD_DATA, ExitCode.DIVERGED)


def main() -> None:
    words = sys.argv[1:]
    own, command = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = Parser(description=__doc__ or "")
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory of the training that the command starts")
    parser.add_argument("--restarts", type=int, default=0, metavar="N", help="after 75 and after a crash (default: 0)")
    args = parser.parse_args(own)
    if not command:
        raise UsageError("expected the command behind --, as in: supervise.py RUN -- deepspeed launch/pretrain.py --run RUN")
    if args.restarts < 0:
        raise UsageError(f"--restarts: expected 0 or more, got {args.restarts}")
    sys.exit(Supervisor(args.run, command).carry_out(args.restarts))


class Supervisor:
    """One command, started until it is done."""

    def __init__(self, run: Path, command: Sequence[str]) -> None:
        self._run = run
        self._command = list(command)
        self._heard: int | None = None
        self._has_asked = False

    def carry_out(self, restarts: int) -> int:
        """The exit code to end with."""
        for number in _SIGNALS:
            signal.signal(number, self._hear)
        if sys.platform == "linux":  # ranks whose launcher has died become ours: they are found, and can be waited for
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
        futile = 0
        for attempt in range(restarts + 1):
            saved_before = newest_checkpoint(self._run)
            code = self._attempt()
            if self._has_asked or not is_worth_a_restart(code):
                break
            if attempt and newest_checkpoint(self._run) == saved_before:
                futile += 1
            else:
                futile = 0
            if futile == FUTILE_RESTARTS:
                _say(f"{futile} restarts have brought no new checkpoint; the next would not either")
                return ExitCode.NO_PROGRESS
            if attempt < restarts:
                pause_s = min(PAUSE_MAX_S, 2.0**futile)
                _say(f"starting again in {in_words(pause_s)}, {restarts - attempt} restarts are left")
                self._sleep(pause_s)
                if self._heard:
                    _say(f"{signal.Signals(self._heard).name} heard: not starting again")
                    break
        if self._has_asked:
            (self._run / "stop").unlink(missing_ok=True)  # it was for this start
        return code

    def _attempt(self) -> int:
        told_before = _content(self._run / "status.json")
        try:
            child = subprocess.Popen(self._command, process_group=0, stdin=subprocess.DEVNULL)
        except OSError as error:
            raise UsageError(f"{self._command[0]} cannot be started: {error}") from None
        _say(f"process {child.pid} started: {' '.join(self._command)}")
        while child.poll() is None:
            self._ask_to_stop()
            time.sleep(POLL_S)
        self._end_leftovers(child.returncode)
        code = verdict(self._run, child.returncode, told_before)
        _say(f"the command ended {_in_words(child.returncode)}: {_name(code)}")
        return code

    def _ask_to_stop(self) -> None:
        if self._heard and not self._has_asked:
            self._has_asked = True
            name = signal.Signals(self._heard).name
            self._run.mkdir(parents=True, exist_ok=True)
            (self._run / "stop").write_text(f"{name} came to supervise.py\n")
            _say(f"{name} heard: {self._run / 'stop'} asks the training to save and end after its step")

    def _end_leftovers(self, code: int) -> None:
        """Wait for what the command has left behind, then kill it."""
        left = descendants(os.getpid())
        if left:
            _say(f"the command ended {_in_words(code)}; {len(left)} processes of it go on and have {in_words(LEFTOVERS_S)}")
        limit_s = time.monotonic() + LEFTOVERS_S
        while left and time.monotonic() < limit_s:
            self._ask_to_stop()
            time.sleep(POLL_S)
            left = descendants(os.getpid())
        while left:
            _say(f"killing processes {', '.join(str(process.pid) for process in left)}")
            for process in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            time.sleep(POLL_S)
            left = descendants(os.getpid())
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass

    def _hear(self, number: int, frame: object) -> None:
        self._heard = self._heard or number

    def _sleep(self, seconds: float) -> None:
        limit_s = time.monotonic() + seconds
        while not self._heard and time.monotonic() < limit_s:
            time.sleep(POLL_S)


def verdict(run: Path, code: int, told_before: bytes) -> int:
    """What the end of a command means; `told_before` stood in status.json when it began."""
    if code in _SAID_BY_THE_PROGRAM:
        return code
    if (run / "FINISHED.json").is_file():
        return ExitCode.DONE
    told = _content(run / "status.json")
    with contextlib.suppress(ValueError, AttributeError):
        if told != told_before and json.loads(told).get("phase") == "stopped":
            return ExitCode.STOPPED
    # A launcher ends with 0 when it was a signal that ended what it launched; above 128 it speaks of a signal.
    return ExitCode.TRANSIENT if code <= 0 or code > 128 or code == ExitCode.TRANSIENT else code


def is_worth_a_restart(code: int) -> bool:
    """Whether another start may end otherwise: after what is transient, and after a crash."""
    return code == ExitCode.TRANSIENT or code not in list(ExitCode)


def newest_checkpoint(run: Path) -> int:
    """The highest committed step; -1: none."""
    steps = [path.name.removeprefix("step-") for path in (run / "checkpoints").glob("step-*") if path.is_dir()]
    return max((int(step) for step in steps if step.isdecimal()), default=-1)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _in_words(code: int) -> str:
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with {code}"


def _name(code: int) -> str:
    return f"{ExitCode(code).name.lower().replace('_', ' ')} ({code})" if code in list(ExitCode) else f"crashed ({code})"


def _say(sentence: str) -> None:
    print(f"supervise: {sentence}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_main(main)
