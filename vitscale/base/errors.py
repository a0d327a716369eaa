"""Errors a user can cause and the exit codes a scheduler can read.

Every message says what was expected, what came and what to change, in one sentence. `run_main` turns such an error
into that sentence and an exit code; a traceback is only ever printed for a defect of our own.
"""

import difflib
import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from enum import IntEnum

from vitscale.base.credentials import masked


class ExitCode(IntEnum):
    """Exit codes of every program here (design.md 4). Launchers may replace them; FINISHED.json is the truth."""

    DONE = 0
    USAGE = 2
    ENVIRONMENT = 3
    TRANSIENT = 75
    STOPPED = 76
    NO_PROGRESS = 77
    BAD_DATA = 78
    DIVERGED = 79


class VitscaleError(Exception):
    """Base of all expected errors; `exit_code` is what the program ends with."""

    exit_code = ExitCode.USAGE
    every_rank_speaks = False
    is_said = False
    """Rank 0 has said it, and all ranks leave together: nobody speaks, nobody waits."""


class UsageError(VitscaleError):
    """A wrong word: flag, key, value, contradiction, or a dataset that does not fit. Exit 2, printed by rank 0."""


class EnvironmentFault(VitscaleError):
    """A missing or damaged file, directory or service. Exit 3, printed by rank 0."""

    exit_code = ExitCode.ENVIRONMENT


class HostFault(EnvironmentFault):
    """A fault only one host can see; that host prints it, whatever its rank."""

    every_rank_speaks = True


class TransientFault(VitscaleError):
    """Something that may be gone on the next start (I/O after all retries). Exit 75: requeue."""

    exit_code = ExitCode.TRANSIENT
    every_rank_speaks = True


class BadDataError(VitscaleError):
    """More bad images than the budget allows. Exit 78: do not requeue."""

    exit_code = ExitCode.BAD_DATA
    every_rank_speaks = True


class DivergedError(VitscaleError):
    """The run has lost its way and would not find back. Exit 79, printed by rank 0: do not requeue."""

    exit_code = ExitCode.DIVERGED


class StopRequested(VitscaleError):
    """Somebody asked the run to stop, and it has saved. Exit 76: the same command continues."""

    exit_code = ExitCode.STOPPED
    is_said = True

    def __init__(self, reason: str) -> None:
        super().__init__(f"stopped because {reason}; the same command continues")
        self.reason = reason


class LeaseLost(TransientFault):
    """Another process owns the run directory now. Exit 75, printed by rank 0; nothing was saved."""

    every_rank_speaks = False


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return `; did you mean X?` for the closest choice, or an empty string when nothing is close."""
    found = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""


_DISK = frozenset([errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE])
"""Errors of the system that speak of the disk, not of us."""

INTERRUPTED = 128 + signal.SIGINT
"""What a shell calls a program ended by Ctrl-C."""

# Launchers kill the other ranks as soon as one has ended. The ranks that stay silent wait this long, so that the
# rank that speaks is never killed before its sentence is out.
SILENT_RANK_WAIT_S = 10.0


def complain(sentence: str) -> None:
    """Print a sentence about trouble to stderr."""
    print(sentence, file=sys.stderr, flush=True)


def run_main(main: Callable[[], None]) -> None:
    """Run `main`, print an expected error as one sentence, and end the process with its exit code."""
    try:
        main()
    except VitscaleError as error:
        # The launcher's own words: the error may be that they make no sense to resolve_cluster.
        ranks = [os.environ[name] for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK") if name in os.environ]
        is_rank_zero = not ranks or ranks[0] == "0"
        if error.is_said:
            pass
        elif is_rank_zero or error.every_rank_speaks:
            print(f"error: {masked(str(error))}", file=sys.stderr, flush=True)
        else:
            time.sleep(SILENT_RANK_WAIT_S)
        _leave(error.exit_code)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        where = f" at {error.filename}" if error.filename else ""
        print(f"error: {error.strerror}{where}; free room or mend the disk, then start again", file=sys.stderr, flush=True)
        _leave(ExitCode.TRANSIENT)
    except KeyboardInterrupt:
        print("interrupted; the same command continues from what was committed", file=sys.stderr, flush=True)
        _leave(INTERRUPTED)


def _leave(code: int) -> None:
    """End at once: a process group whose peers are gone must not be waited for in an exit handler."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(code))
