"""Two hosts on one machine: network namespaces joined by a cable, a host name and an sshd in each, one core for each.

    node1 10.213.7.1 eth0 ---- eth0 10.213.7.2 node2

`deepspeed --hostfile` runs in the first one and reaches both by pdsh and ssh, as on a cluster; files are shared, as by NFS.
Each host has one core, so that a rank has one thread, as two ranks on one host of two cores have.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NODES = ("node1", "node2")
ADDRESSES = ("10.213.7.1", "10.213.7.2")
PORT = 2213
MASTER_PORT = 29613

_BE_NODE = "import os, socket, sys; socket.sethostname(sys.argv[1]); os.execv(sys.argv[2], sys.argv[2:])"


def what_is_missing() -> str:
    """Why there can be no two hosts here; empty: nothing."""
    if os.geteuid() != 0:
        return "root"
    missing = [name for name in ("ip", "unshare", "taskset", "ssh", "ssh-keygen", "sshd", "pdsh") if _found(name) is None]
    if not missing and len(os.sched_getaffinity(0)) < 2:
        return "a second core"
    return ", ".join(missing)


def _found(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _run(*command: str | Path) -> None:
    subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True)


@dataclass(frozen=True)
class TwoHosts:
    """What stands while `two_hosts` is open."""

    directory: Path
    """Keys and configurations; commands are started here."""
    spaces: tuple[str, str]
    daemons: tuple[subprocess.Popen, subprocess.Popen]

    def command(self, node: int, *words: str | Path) -> list[str]:
        """A command as it runs on one of the hosts; its first word must be a path."""
        inside = ["ip", "netns", "exec", self.spaces[node], "unshare", "--uts", sys.executable, "-c", _BE_NODE, NODES[node]]
        return [*inside, *map(str, words)]

    def environment(self) -> dict[str, str]:
        ours = {"PDSH_SSH_ARGS_APPEND": f"-F {self.directory / 'ssh_config'}", "PDSH_RCMD_TYPE": "ssh", "PYTHONPATH": str(ROOT)}
        return {**os.environ, **ours}

    def hostfile(self, *slots: int) -> Path:
        path = self.directory / f"hostfile-{'-'.join(map(str, slots))}"
        path.write_text("".join(f"{node} slots={count}\n" for node, count in zip(NODES, slots, strict=False)))
        return path

    def write_environment_file(self, **values: str) -> None:
        """What deepspeed gives to the ranks on all hosts."""
        (self.directory / ".deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in values.items()))

    def start(self, script: str, *arguments: str | Path, said: Path, slots: Sequence[int] = (1, 1)) -> subprocess.Popen:
        """`deepspeed --hostfile … launch/<script>.py` on the first host; its output goes to `said`."""
        deepspeed = Path(sys.executable).with_name("deepspeed")
        options = ["--hostfile", self.hostfile(*slots), "--no_ssh_check", "--force_multi"]
        options += ["--master_addr", ADDRESSES[0], "--master_port", str(MASTER_PORT)]
        command = [sys.executable, deepspeed, *options, ROOT / "launch" / f"{script}.py", *arguments]
        with open(said, "w") as file:
            return subprocess.Popen(
                self.command(0, *command),
                cwd=self.directory,
                env=self.environment(),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def processes(self, node: int) -> list[int]:
        """All that runs on a host but its sshd: also what lost its parent."""
        listed = subprocess.run(["ip", "netns", "pids", self.spaces[node]], capture_output=True, text=True)
        return [int(pid) for pid in listed.stdout.split() if int(pid) != self.daemons[node].pid]

    def cut(self) -> None:
        """Pull the cable out of the second host."""
        _run("ip", "-n", self.spaces[1], "link", "set", "eth0", "down")

    def mend(self) -> None:
        _run("ip", "-n", self.spaces[1], "link", "set", "eth0", "up")

    def clear(self, launcher: subprocess.Popen) -> None:
        """End what a test has left over."""
        for pid in [*self.processes(0), *self.processes(1)]:
            _kill(pid)
        launcher.kill()
        launcher.wait()
        self.mend()


@contextmanager
def two_hosts(directory: Path) -> Iterator[TwoHosts]:
    """Make the hosts, and take them down again whatever happens."""
    directory.mkdir(parents=True, exist_ok=True)
    spaces = (f"vitscale-{os.getpid()}-1", f"vitscale-{os.getpid()}-2")
    daemons: list[subprocess.Popen] = []
    try:
        _lay_cable(spaces)
        _write_keys(directory)
        cores = sorted(os.sched_getaffinity(0))
        for node in range(2):
            hosts = TwoHosts(directory, spaces, ())  # type: ignore[arg-type]
            sshd = _found("sshd") or ""
            command = hosts.command(
                node, sshd, "-D", "-e", "-f", directory / "sshd_config", "-h", directory / f"host_key_{node}"
            )
            daemons.append(
                subprocess.Popen(
                    ["taskset", "-c", str(cores[node]), *command],
                    stdout=subprocess.DEVNULL,
                    stderr=open(directory / f"sshd-{node}.log", "w"),  # noqa: SIM115
                )
            )
        hosts = TwoHosts(directory, spaces, (daemons[0], daemons[1]))
        for node in NODES:
            _wait_for_ssh(hosts, node)
        yield hosts
    finally:
        for daemon in daemons:
            daemon.kill()
            daemon.wait()
        for space in spaces:
            for pid in subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True).stdout.split():
                _kill(int(pid))
            subprocess.run(["ip", "netns", "delete", space], capture_output=True)


def _lay_cable(spaces: tuple[str, str]) -> None:
    for space in spaces:
        _run("ip", "netns", "add", space)
        _run("ip", "-n", space, "link", "set", "lo", "up")
    _run("ip", "-n", spaces[0], "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", spaces[1])
    for space, address in zip(spaces, ADDRESSES, strict=True):
        _run("ip", "-n", space, "address", "add", f"{address}/24", "dev", "eth0")
        _run("ip", "-n", space, "link", "set", "eth0", "up")


def _write_keys(directory: Path) -> None:
    for name in ("key", "host_key_0", "host_key_1"):
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / name)
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd wants it for its unprivileged half
    server = ["StrictModes no", "UsePAM no", "PidFile none", "PasswordAuthentication no", "PermitRootLogin yes"]
    server += [f"Port {PORT}", f"AuthorizedKeysFile {directory / 'key.pub'}"]
    (directory / "sshd_config").write_text("\n".join(server) + "\n")
    client = ["Host *", "User root", f"Port {PORT}", f"IdentityFile {directory / 'key'}", "StrictHostKeyChecking no"]
    client += ["UserKnownHostsFile /dev/null", "LogLevel ERROR", "BatchMode yes"]
    client += ["ServerAliveInterval 5", "ServerAliveCountMax 2"]  # else ssh outlives a cable for a quarter of an hour
    lines = [f"Host {node}\nHostName {address}" for node, address in zip(NODES, ADDRESSES, strict=True)]
    (directory / "ssh_config").write_text("\n".join([*lines, *client]) + "\n")


def _wait_for_ssh(hosts: TwoHosts, node: str) -> None:
    command = hosts.command(0, _found("ssh") or "", "-F", hosts.directory / "ssh_config", node, "true")
    for _ in range(50):
        ended = subprocess.run(command, capture_output=True, text=True)
        if ended.returncode == 0:
            return
        time.sleep(0.1)
    raise RuntimeError(f"ssh to {node} fails: {ended.stderr}")
