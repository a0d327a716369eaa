"""Named fault points: places where a test, or a user who wants proof, makes the program fail on purpose.

VITSCALE_FAULT="kill@checkpoint.rename:rank=1:step=12"
                 what  where             when (every condition must hold)

what   kill   SIGKILL of this process, as the out-of-memory killer or a lost node would do
       stop   SIGSTOP: the process is there and does nothing
       raise  RuntimeError from inside the code
"""

import os
import signal

from vitscale.base.errors import UsageError, nearest

POINTS = (
    "build.piece",
    "build.shard",
    "checkpoint.begin",
    "checkpoint.staged",
    "checkpoint.files",
    "checkpoint.commit",
    "checkpoint.rename",
    "checkpoint.latest",
    "rollback.recorded",
    "rollback.deleted",
    "step.end",
)
ACTIONS = ("kill", "stop", "raise")


def fault_point(where: str, **here: int) -> None:
    """Do what VITSCALE_FAULT asks for at this point; nothing when it is unset or speaks of another point."""
    order = os.environ.get("VITSCALE_FAULT")
    if not order:
        return
    action, point, conditions = _parse(order)
    if point != where:
        return
    for name, value in conditions.items():
        if name not in here:
            raise UsageError(f"VITSCALE_FAULT: {point} has no {name!r}, it has {', '.join(here)}{nearest(name, here)}")
        if here[name] != value:
            return
    if action == "raise":
        raise RuntimeError(f"fault point {where} {here}: raised as VITSCALE_FAULT asked")
    os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGSTOP)


def _parse(order: str) -> tuple[str, str, dict[str, int]]:
    action, _, rest = order.partition("@")
    point, *pairs = rest.split(":")
    if action not in ACTIONS:
        raise UsageError(
            f"VITSCALE_FAULT: expected one of {', '.join(ACTIONS)} before @, got {action!r}{nearest(action, ACTIONS)}"
        )
    if point not in POINTS:
        raise UsageError(f"VITSCALE_FAULT: there is no fault point {point!r} among {', '.join(POINTS)}{nearest(point, POINTS)}")
    conditions = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        if not value.isdecimal():
            raise UsageError(f"VITSCALE_FAULT: expected NAME=NUMBER after the point, got {pair!r}")
        conditions[name] = int(value)
    return action, point, conditions
