"""What counts as a launcher above a rank: whoever would end the rank, and no shell."""

import pytest

from vitscale.base.host import Ancestor, Process
from vitscale.base.launchers import launchers_above, launchers_of, program_of

PYTHON = "/usr/bin/python3.11"
RUNNER = (PYTHON, "/opt/bin/deepspeed", "--num_gpus", "2", "launch/pretrain.py")
NODE = (PYTHON, "-u", "-m", "deepspeed.launcher.launch", "--world_info=e30=", "launch/pretrain.py")
SHELL = ("bash", "-c", "cd /home; deepspeed launch/pretrain.py")
LOGIN = ("-bash",)
SSHD = ("sshd: somebody@notty",)
INIT = ("/sbin/init",)


@pytest.mark.parametrize(
    ("argv", "program"),
    [
        (RUNNER, "deepspeed"),
        ((PYTHON, "-m", "deepspeed.launcher.runner"), "deepspeed.launcher.runner"),
        (NODE, "deepspeed.launcher.launch"),
        ((PYTHON, "-X", "dev", "-W", "ignore", "/venv/bin/torchrun", "--nproc_per_node", "2"), "torchrun"),
        (("/venv/bin/accelerate", "launch"), "accelerate"),
        ((PYTHON, "launch/supervise.py", "runs/a", "--", "deepspeed"), "supervise.py"),
        ((PYTHON, "-c", "deepspeed"), "-c"),
        ((PYTHON, "-m", "pytest", "deepspeed"), "pytest"),
        ((PYTHON,), "python3.11"),
        (SHELL, "bash"),
        (SSHD, "sshd"),
        (("vim", "deepspeed"), "vim"),
        ((), ""),
        (("",), ""),
    ],
)
def test_what_runs_is_read_from_the_command_line(argv, program):
    assert program_of(argv) == program


@pytest.mark.parametrize(
    ("above", "counted"),
    [
        ([NODE, RUNNER, LOGIN, SSHD, INIT], [0, 1]),  # a person who logs out after nohup takes nothing along
        ([NODE, SHELL, SSHD, ("sshd: root [priv]",), INIT], [0, 2, 3]),  # the runner is on another host
        ([NODE, RUNNER, (PYTHON, "launch/supervise.py", "runs/a"), SHELL], [0, 1, 2]),
        ([(PYTHON, "/venv/bin/torchrun"), SHELL, INIT], [0]),
        ([SHELL, ("tmux",), INIT], []),
        ([], []),
    ],
)
def test_launchers_are_told_from_shells(above, counted):
    chain = [Ancestor(process=Process(pid=9 - i, started_ticks=i), argv=argv) for i, argv in enumerate(above)]
    assert launchers_of(chain) == [chain[i].process for i in counted]


def test_no_launcher_has_started_this_test():
    assert launchers_above() == []
