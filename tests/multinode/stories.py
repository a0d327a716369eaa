"""What can happen to a run over two hosts, acted out: each story starts `deepspeed --hostfile` and tells how it ended."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.program import SMALL, curve
from tests.multinode.two_hosts import TwoHosts

RUN_ARGUMENTS = (*SMALL, "train.length=40", "run.save_every=5", "run.eval_every=0", "run.log_every=1")
NAMES = ("loss", "grad_norm", "samples_hash", "images_seen")
START_S = 180.0
END_S = 90.0


@dataclass(frozen=True, kw_only=True)
class Story:
    """How a start of the launcher ended."""

    exit_code: int
    """Of `deepspeed`; launchers replace the codes of the ranks."""
    took_s: float
    ended_after_s: float
    """From the fault to the end of the last rank; 0 without a fault."""
    left_over: tuple[int, ...]
    """Processes of the run on either host 5 s after its ranks had ended or should have."""
    text: str

    @property
    def sentence(self) -> str:
        """The first error that was said."""
        return next((line.partition("error: ")[2] for line in self.text.splitlines() if "error: " in line), "")


def ranks_on(hosts: TwoHosts, node: int) -> list[int]:
    """Processes of the training script on a host: ranks and their data workers, not launchers."""
    found = []
    for pid in hosts.processes(node):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if any(word.endswith(b"launch/pretrain.py") for word in words[:4]):
            found.append(pid)
    return found


def plain(hosts: TwoHosts, run: Path, *, said: Path, slots: Sequence[int] = (1, 1), more: Sequence[str] = ()) -> Story:
    """Start and wait for the end."""
    started_s = time.monotonic()
    launcher = hosts.start("pretrain", "--run", run, *RUN_ARGUMENTS, *more, said=said, slots=slots)
    try:
        launcher.wait(START_S)
        return _story(launcher, hosts, started_s=started_s, fault_s=None, said=said)
    finally:
        hosts.clear(launcher)


def killed_rank(hosts: TwoHosts, run: Path, *, said: Path) -> Story:
    """SIGKILL of the rank on the second host in mid-run."""
    return _disturbed(hosts, run, lambda: [os.kill(pid, signal.SIGKILL) for pid in ranks_on(hosts, 1)], said=said)


def stopped_rank(hosts: TwoHosts, run: Path, *, said: Path) -> Story:
    """SIGSTOP of the rank on the second host: alone there, so nobody beside it can end it."""
    return _disturbed(hosts, run, lambda: [os.kill(pid, signal.SIGSTOP) for pid in ranks_on(hosts, 1)], said=said)


def cut_cable(hosts: TwoHosts, run: Path, *, said: Path) -> Story:
    """The link between the hosts goes down in mid-step; nothing tells either side."""
    return _disturbed(hosts, run, hosts.cut, said=said)


def _disturbed(hosts: TwoHosts, run: Path, fault: Callable[[], object], *, said: Path) -> Story:
    started_s = time.monotonic()
    launcher = hosts.start("pretrain", "--run", run, *RUN_ARGUMENTS, "run.step_timeout=10", said=said)
    try:
        while len(curve(run)) < 7:
            assert launcher.poll() is None and time.monotonic() - started_s < START_S, said.read_text()
            time.sleep(0.005)
        fault()
        fault_s = time.monotonic()
        while (ranks_on(hosts, 0) or ranks_on(hosts, 1)) and time.monotonic() - fault_s < END_S:
            time.sleep(0.05)
        return _story(launcher, hosts, started_s=started_s, fault_s=fault_s, said=said)
    finally:
        hosts.clear(launcher)


def _story(launcher: subprocess.Popen, hosts: TwoHosts, *, started_s: float, fault_s: float | None, said: Path) -> Story:
    ended_after_s = time.monotonic() - fault_s if fault_s is not None else 0.0
    left_over = (*ranks_on(hosts, 0), *ranks_on(hosts, 1))
    try:
        code = launcher.wait(END_S)
    except subprocess.TimeoutExpired:
        code = -1
    took_s = time.monotonic() - started_s
    return Story(exit_code=code, took_s=took_s, ended_after_s=ended_after_s, left_over=left_over, text=said.read_text())
