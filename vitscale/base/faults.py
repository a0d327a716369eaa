"""Named fault points: places where a test, or a user who wants proof, makes the program fail on purpose.

VITSCALE_FAULT="kill@checkpoint.rename:rank=1:step=12;slow@data.batch:seconds=0.2"
                 what  where             when (every condition must hold); behind ; another fault

what   kill           SIGKILL of this process, as the out-of-memory killer or a lost node would do
       stop           SIGSTOP: the process is there and does nothing
       raise          RuntimeError from inside the code
       enospc, eio    OSError with this errno, as a full or a failing disk gives
       slow           sleeps `seconds`
       nan, bitflip   change a number, at the points that have one: see vitscale/training/faulty.py

A condition compares a number the point knows, such as rank, step or worker. The rest says how:

once=PATH             only the first process that makes this file, and never again: a restart meets the fault no more
seconds=S             slow
tensor=N element=N bit=N   which number of which tensor is changed (default 0), and which of its bits (bitflip, default 0)
"""

import errno
import functools
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from vitscale.base.errors import UsageError, nearest

VARIABLE = "VITSCALE_FAULT"
VALUE_POINTS = (
    "step.loss",
    "step.weights",
)
POINTS = (
    "build.piece",
    "build.shard",
    "checkpoint.begin",
    "checkpoint.staged",
    "checkpoint.files",
    "checkpoint.commit",
    "checkpoint.rename",
    "checkpoint.latest",
    "data.batch",
    "evaluate.begin",
    "rollback.recorded",
    "rollback.deleted",
    "step.forward",
    "step.backward",
    "step.optimizer",
    "step.end",
    "worker.batch",
    *VALUE_POINTS,
)
ERRNOS = {"enospc": errno.ENOSPC, "eio": errno.EIO}
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
CHANGES = ("nan", "bitflip")
ACTIONS = (*SIGNALS, "raise", *ERRNOS, "slow", *CHANGES)
PLACES = ("tensor", "element", "bit")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One of the faults of VITSCALE_FAULT."""

    action: str
    point: str
    conditions: dict[str, int] = field(default_factory=dict)
    once: str = ""
    seconds: float = 0.0
    tensor: int = 0
    element: int = 0
    bit: int = 0

    def is_met(self, here: dict[str, int]) -> bool:
        """Whether every condition holds here; with `once`, true for one caller only."""
        for name, value in self.conditions.items():
            if name not in here:
                raise UsageError(
                    f"{VARIABLE}: {self.point} has no {name!r}, it has {', '.join(here) or 'none'}{nearest(name, here)}"
                )
            if here[name] != value:
                return False
        return not self.once or _is_first(self.once)

    def strike(self, here: dict[str, int]) -> None:
        """Do what the action says, unless it is one that changes a number."""
        if self.action in SIGNALS:
            os.kill(os.getpid(), SIGNALS[self.action])
        elif self.action in ERRNOS:
            number = ERRNOS[self.action]
            raise OSError(number, f"{os.strerror(number)} (fault point {self.point})")
        elif self.action == "slow":
            time.sleep(self.seconds)
        elif self.action == "raise":
            raise RuntimeError(f"fault point {self.point} {here}: raised as {VARIABLE} asked")


def fault_point(where: str, **here: int) -> None:
    """Do what VITSCALE_FAULT asks for at this point; nothing when it is unset or speaks of another point."""
    if order := os.environ.get(VARIABLE):
        for fault in _due(order, where, here):
            fault.strike(here)


def changes_at(where: str, **here: int) -> list[Fault]:
    """The changes of a number that VITSCALE_FAULT asks for at this point; its other faults strike at once."""
    if not (order := os.environ.get(VARIABLE)):
        return []
    changes = []
    for fault in _due(order, where, here):
        if fault.action in CHANGES:
            changes.append(fault)
        else:
            fault.strike(here)
    return changes


def _due(order: str, where: str, here: dict[str, int]) -> Iterator[Fault]:
    return (fault for fault in faults_of(order) if fault.point == where and fault.is_met(here))


@functools.lru_cache(maxsize=8)
def faults_of(order: str) -> tuple[Fault, ...]:
    """The faults a text asks for. Raises UsageError for a wrong word."""
    return tuple(_parsed(text.strip()) for text in order.split(";") if text.strip())


def _parsed(text: str) -> Fault:
    action, _, rest = text.partition("@")
    point, *pairs = rest.split(":")
    if action not in ACTIONS:
        raise UsageError(f"{VARIABLE}: expected one of {', '.join(ACTIONS)} before @, got {action!r}{nearest(action, ACTIONS)}")
    if point not in POINTS:
        raise UsageError(f"{VARIABLE}: there is no fault point {point!r} among {', '.join(POINTS)}{nearest(point, POINTS)}")
    if action in CHANGES and point not in VALUE_POINTS:
        raise UsageError(f"{VARIABLE}: {point} has no number that {action} could change; expected {' or '.join(VALUE_POINTS)}")
    conditions: dict[str, int] = {}
    how: dict[str, int] = {}
    seconds, once = 0.0, ""
    for pair in pairs:
        name, _, value = pair.partition("=")
        if name == "once" and value:
            once = value
        elif name == "seconds" and value.replace(".", "", 1).isdecimal():
            seconds = float(value)
        elif not value.isdecimal():
            raise UsageError(f"{VARIABLE}: expected NAME=NUMBER after the point, got {pair!r}")
        else:
            (how if name in PLACES else conditions)[name] = int(value)
    if (action == "slow") != (seconds > 0):
        raise UsageError(f"{VARIABLE}: slow, and nothing else, takes seconds=S with S > 0, got {text!r}")
    if how and action not in CHANGES:
        raise UsageError(f"{VARIABLE}: {next(iter(how))}= goes with {' and '.join(CHANGES)} only, got {text!r}")
    return Fault(action=action, point=point, conditions=conditions, once=once, seconds=seconds, **how)


def _is_first(path: str) -> bool:
    """Whether this call makes the file. One process wins, also among several hosts on a shared file system."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    except OSError as error:
        raise UsageError(f"{VARIABLE}: once={path} cannot be made ({error}); its directory must exist") from None
    return True
