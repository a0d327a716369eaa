"""The launcher processes above a rank: when one of them is gone, nobody will end this rank any more.

What counts is known by its command line: deepspeed (the runner, and its launcher on each node), torchrun, accelerate, and
supervise.py. A shell does not count, so that nohup works. Where a node launcher has no runner above it, the runner is on
another host and its ssh connection stands for it: then the sshd above counts.
"""

import os
from collections.abc import Sequence
from pathlib import PurePath

from vitscale.base.host import Ancestor, Process, ancestors

_RUNNERS = ("deepspeed", "ds", "deepspeed.launcher.runner")
_NODE_LAUNCHERS = ("deepspeed.launcher.launch",)
_OTHERS = (
    "torchrun",
    "torch.distributed.run",
    "torch.distributed.launch",
    "accelerate",
    "accelerate.commands.launch",
    "supervise.py",
    "launch.supervise",
)


def launchers_above() -> list[Process]:
    """The launchers that started this process, nearest first."""
    return launchers_of(ancestors(os.getpid()))


def launchers_of(above: Sequence[Ancestor]) -> list[Process]:
    """Which of the processes above a rank are launchers. Pure."""
    programs = [program_of(one.argv) for one in above]
    counting = {*_RUNNERS, *_NODE_LAUNCHERS, *_OTHERS}
    if any(program in _NODE_LAUNCHERS for program in programs) and not any(program in _RUNNERS for program in programs):
        counting.add("sshd")
    return [one.process for one, program in zip(above, programs, strict=True) if program in counting]


def launchers_of_one_start(above: Sequence[Ancestor]) -> list[Process]:
    """Those that start their ranks once, nearest first: `deepspeed`. supervise.py and torchrun start them again. Pure."""
    return [one.process for one in above if program_of(one.argv) in (*_RUNNERS, *_NODE_LAUNCHERS)]


def program_of(argv: Sequence[str]) -> str:
    """What runs: the name of a program, or of the script or module that Python runs. Pure."""
    name = PurePath(argv[0]).name if argv else ""
    if not name.startswith("python"):
        return "sshd" if name.startswith("sshd") else name
    words = iter(argv[1:])
    for word in words:
        if word in ("-m", "-c"):
            return next(words, "") if word == "-m" else "-c"
        if word in ("-X", "-W"):
            next(words, None)
        elif not word.startswith("-"):
            return PurePath(word).name
    return name
