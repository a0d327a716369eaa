"""One owner per run directory: the lease says who, and lets nobody else commit.

RUN/
  .lease-000007   the token of generation 7, made by an exclusive hard link: whoever makes it owns the run. Who that is
                  stands in it, and its modification time is the heartbeat. The highest token rules.
  lease.json      the same for people to read, with the time of the last heartbeat; nothing here reads it

Taking: judge the owner of the highest token n | link one's own record as token n + 1, which one taker alone can | look at
n again: an owner that was only late has shown a heartbeat by now, and keeps the run | delete the lower tokens.
Asking whether it is still mine, before a rename: give a heartbeat | look for a higher token. Each side writes before it
reads, so of an owner that wakes up and a taker at least one sees the other. At a clean end the token is marked as
released and stays, so that no generation is ever given twice.

An owner is dead on its own host (equal name, boot and pid namespace) as soon as its process is gone. From elsewhere it is
dead after DEAD_AFTER_S without a heartbeat, by the clock of the file system: the time of a file made now against that of
the token. Clocks of hosts are never compared.
"""

import contextlib
import errno
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType

from vitscale.base.errors import EnvironmentFault
from vitscale.base.files import canonical_json, temporary_beside, write_bytes, write_json
from vitscale.base.host import Process, host_id, is_alive, is_stopped, process_of

LEASE = "lease.json"
HEARTBEAT_S = 2.0
RECORD_EVERY_S = 10.0
"""How often lease.json tells of the heartbeat."""
DEAD_AFTER_S = 60.0
REBOOTED_AFTER_S = 10.0
"""The same where the host of this name has booted since. Not at once: many hosts are called localhost."""
_TOKEN = re.compile(r"\.lease-(\d{6,})$")


@dataclass(frozen=True, kw_only=True)
class Owner:
    """What a token says."""

    owner_id: str
    """Random: no two lives of a process share it."""
    host: str
    boot_id: str
    pid_namespace: str
    pid: int
    started_ticks: int
    taken_at_unix_s: float
    released: bool = False


@dataclass(frozen=True, kw_only=True)
class Token:
    """A token as it was found."""

    generation: int
    owner: Owner | None
    """None: what stands in the token is no record."""
    heartbeat_ns: int
    """By the clock of the file system."""


def this_process() -> Owner:
    """This process as an owner from now on."""
    process = process_of(os.getpid())
    host, boot_id, pid_namespace = host_id()
    return Owner(
        owner_id=secrets.token_hex(8),
        host=host,
        boot_id=boot_id,
        pid_namespace=pid_namespace,
        pid=os.getpid(),
        started_ticks=process.started_ticks if process else 0,
        taken_at_unix_s=time.time(),
    )


def take_lease(
    run: Path,
    *,
    me: Owner | None = None,
    say: Callable[[str], None] = lambda sentence: None,
    sleep: Callable[[float], None] = time.sleep,
) -> "Lease":
    """Own the run directory from now on. Raises EnvironmentFault where another owner lives.

    An owner on another host that shows a heartbeat lives, which is seen within seconds; one that shows none is waited for
    until it counts as dead.
    """
    me = me or this_process()
    seen: Token | None = None
    while True:
        token = highest(run)
        if token is None or is_free(token, me) or _is_silent(run, token, me):
            if _claim(run, token, me):
                if token is not None and not (token.owner and token.owner.released):
                    say(f"{_named(token.owner)} owned {run} and is gone; this process takes over")
                return Lease(run, me, generation=token.generation + 1 if token else 1)
            seen = None
            continue
        has_moved = seen is not None and seen.owner == token.owner and seen.heartbeat_ns != token.heartbeat_ns
        if has_moved or _is_same_host(token.owner, me):
            raise EnvironmentFault(_refusal(run, token.owner, me))
        if seen is None or seen.owner != token.owner:
            say(f"{_named(token.owner)} owns {run}; waiting for a heartbeat of it, {DEAD_AFTER_S:.0f} s at most")
            seen = token
        sleep(HEARTBEAT_S / 4)


def is_free(token: Token, me: Owner) -> bool:
    """Whether the owner has released the run, or its process on this host is gone."""
    owner = token.owner
    return owner is not None and (owner.released or (_is_same_host(owner, me) and not is_alive(_process(owner))))


def _is_silent(run: Path, token: Token, me: Owner) -> bool:
    """Whether an owner elsewhere has shown no heartbeat for so long that it counts as dead."""
    if _is_same_host(token.owner, me):
        return False
    is_rebooted = token.owner is not None and token.owner.host == me.host and token.owner.boot_id != me.boot_id
    silent_s = (file_system_now_ns(run) - token.heartbeat_ns) / 1e9
    return silent_s > (REBOOTED_AFTER_S if is_rebooted else DEAD_AFTER_S)


class Lease:
    """The lease in the hands of its owner. As a context it keeps the heartbeat going, and releases the run at the end."""

    def __init__(self, run: Path, owner: Owner, *, generation: int) -> None:
        self.run = run
        self.owner = owner
        self.generation = generation
        self.is_lost = False
        """A heartbeat has found another owner; for a loop that must not wait for the file system."""
        self._path = run / f".lease-{generation:06d}"
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._record()

    def is_mine(self) -> bool:
        """Whether this process still owns the run; ask right before a commit. OSError: the files cannot be reached."""
        self._show_heartbeat()
        file_system_now_ns(self.run)  # a change of the directory: NFS would else show the tokens of some seconds ago
        self._look_for_another()
        return not self.is_lost

    def release(self) -> None:
        """Give the run back."""
        if self.is_mine():
            (self.run / LEASE).unlink(missing_ok=True)
            write_bytes(self._path, canonical_json(asdict(replace(self.owner, released=True))))

    def __enter__(self) -> "Lease":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ending.set()
        self._thread.join(HEARTBEAT_S)
        if not self._thread.is_alive():  # else the file system hangs, and would hang this as well
            with contextlib.suppress(OSError):  # the next owner waits a minute at most; what ends the run is worth more
                self.release()

    def _show_heartbeat(self) -> None:
        try:
            os.utime(self._path)  # by the clock of the file system, also on NFS
        except FileNotFoundError:
            self.is_lost = True

    def _look_for_another(self) -> None:
        token = highest(self.run)
        self.is_lost = self.is_lost or token is None or token.owner != self.owner

    def _record(self) -> None:
        write_json(self.run / LEASE, {**asdict(self.owner), "generation": self.generation, "heartbeat_unix_s": time.time()})

    def _keep(self) -> None:
        recorded_at_s = time.monotonic()
        while not self._ending.wait(HEARTBEAT_S) and not self.is_lost:
            with contextlib.suppress(OSError):  # a file system that is away for a while is no new owner
                self._show_heartbeat()
                self._look_for_another()
                if not self.is_lost and time.monotonic() - recorded_at_s >= RECORD_EVERY_S:
                    self._record()
                    recorded_at_s = time.monotonic()


def highest(run: Path) -> Token | None:
    """The token that rules, or None where the run was never owned."""
    while True:
        generations = [int(match.group(1)) for name in os.listdir(run) if (match := _TOKEN.match(name))]
        if not generations:
            return None
        with contextlib.suppress(FileNotFoundError):  # a higher one has come, and this was deleted
            return _read(run, max(generations))


def file_system_now_ns(run: Path) -> int:
    """What the clock of the file system shows."""
    with temporary_beside(run / ".lease-clock") as probe:
        probe.touch()
        return probe.stat().st_mtime_ns


def _read(run: Path, generation: int) -> Token:
    with open(run / f".lease-{generation:06d}", "rb") as file:  # opened first: NFS looks at the server then
        heartbeat_ns = os.fstat(file.fileno()).st_mtime_ns
        content = file.read()
    try:
        owner = Owner(**json.loads(content))
    except (ValueError, TypeError):
        owner = None
    return Token(generation=generation, owner=owner, heartbeat_ns=heartbeat_ns)


def _claim(run: Path, judged: Token | None, me: Owner) -> bool:
    """Make the token after `judged`, which was found free. False: somebody else did, or its owner has come back."""
    generation = judged.generation + 1 if judged else 1
    token = run / f".lease-{generation:06d}"
    with temporary_beside(token) as temporary:
        with open(temporary, "wb") as file:
            file.write(canonical_json(asdict(me)))
            file.flush()
            os.fsync(file.fileno())
        if not _link(temporary, token):
            return False
    # Two late ways to lose: others had claimed and deleted this generation long ago; or the owner was only late.
    ruling = highest(run)
    if ruling is None or ruling.owner != me or (judged is not None and not _is_unchanged(run, judged)):
        token.unlink(missing_ok=True)
        return False
    for name in os.listdir(run):
        if (match := _TOKEN.match(name)) and int(match.group(1)) < generation:
            (run / name).unlink(missing_ok=True)
    return True


def _link(temporary: Path, token: Path) -> bool:
    """Give a file a second name that must not exist yet."""
    try:
        os.link(temporary, token)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        return _copy_exclusively(temporary, token)
    # Over NFS a link may be made and its answer lost: the count of links tells.
    return os.stat(temporary).st_nlink > 1


def _copy_exclusively(temporary: Path, token: Path) -> bool:
    """The same where there are no hard links. Until the record is in it, others see an owner they do not know."""
    try:
        with open(token, "xb") as file:
            file.write(temporary.read_bytes())
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        return False
    return True


def _is_unchanged(run: Path, judged: Token) -> bool:
    try:
        return _read(run, judged.generation) == judged
    except FileNotFoundError:
        return True


def _is_same_host(owner: Owner | None, me: Owner) -> bool:
    places = [(one.host, one.boot_id, one.pid_namespace) for one in (owner, me) if one is not None and one.boot_id]
    return len(places) == 2 and places[0] == places[1]


def _process(owner: Owner) -> Process:
    return Process(pid=owner.pid, started_ticks=owner.started_ticks)


def _named(owner: Owner | None) -> str:
    return f"process {owner.pid} on {owner.host}" if owner else "an owner whose record cannot be read"


def _refusal(run: Path, owner: Owner | None, me: Owner) -> str:
    since = time.strftime(" since %Y-%m-%d %H:%M:%S UTC", time.gmtime(owner.taken_at_unix_s)) if owner else ""
    is_held = owner is not None and _is_same_host(owner, me) and is_stopped(_process(owner))
    return (
        f"{run} is being trained by {_named(owner)}{since}{' (it is stopped: state T)' if is_held else ''}; create the file "
        f"{run / 'stop'} to end that training after its next step, or give another --run directory"
    )
