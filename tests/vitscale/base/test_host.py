"""A process is told from a later one of the same pid, and the tree of processes is read as it is."""

import mmap
import os
import signal
import subprocess
import sys
import time

from vitscale.base.host import (
    Process,
    ancestors,
    bytes_of_its_own,
    descendants,
    host_id,
    is_alive,
    is_stopped,
    of_sessions,
    process_of,
    process_table,
    seconds_since_start,
)

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def test_a_process_lives_until_it_has_ended_not_until_it_is_waited_for():
    child = subprocess.Popen(SLEEP)
    process = process_of(child.pid)
    assert is_alive(process) and not is_stopped(process)
    child.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
    assert is_alive(process) and is_stopped(process)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process_of(child.pid) == process and not is_alive(process)
    child.wait()
    assert process_of(child.pid) is None and not is_alive(process)


def test_another_start_time_is_another_process():
    me = process_of(os.getpid())
    assert is_alive(me)
    assert not is_alive(Process(pid=me.pid, started_ticks=me.started_ticks + 1))


def test_ancestors_and_descendants_are_the_tree():
    shell = subprocess.Popen(["sh", "-c", "sleep 60; exit 7"])
    limit_s = time.monotonic() + 10
    while not descendants(shell.pid) and time.monotonic() < limit_s:
        time.sleep(0.01)
    (sleep,) = descendants(shell.pid)
    above = ancestors(sleep.pid)
    assert [one.process.pid for one in above[:2]] == [shell.pid, os.getpid()]
    assert above[0].argv == ("sh", "-c", "sleep 60; exit 7")
    assert process_of(shell.pid) in descendants(os.getpid()) and sleep in descendants(os.getpid())
    os.kill(sleep.pid, signal.SIGKILL)
    assert shell.wait(10) == 7
    assert sleep not in descendants(os.getpid())


def test_the_table_says_session_command_and_environment_of_all_that_have_not_ended():
    child = subprocess.Popen(
        ["sh", "-c", "sleep 60 & sleep 60"], start_new_session=True, env={"MARK": "a=b", "PATH": os.environ["PATH"]}
    )
    limit_s = time.monotonic() + 10
    while len(own := of_sessions([child.pid])) < 3 and time.monotonic() < limit_s:
        time.sleep(0.01)
    assert sorted(entry.parent for entry in own) == sorted([os.getpid(), child.pid, child.pid])
    (shell,) = [entry for entry in own if entry.pid == child.pid]
    assert shell.argv == ("sh", "-c", "sleep 60 & sleep 60") and shell.environment["MARK"] == "a=b"
    assert 0 < bytes_of_its_own(child.pid) < 1 << 30
    os.killpg(child.pid, signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert child.pid not in [entry.pid for entry in process_table()]  # it has ended, and was not waited for
    child.wait()
    assert bytes_of_its_own(child.pid) == 0 and shell.argv == () and shell.environment == {}


def test_a_name_with_brackets_and_spaces_is_only_a_name(tmp_path):
    program = tmp_path / "a) R (b 1 2"
    program.symlink_to(sys.executable)
    child = subprocess.Popen([str(program), "-c", "import time; time.sleep(60)"])
    process = process_of(child.pid)
    assert 0 <= seconds_since_start(process) < 10 and is_alive(process)
    assert ancestors(child.pid)[0].process.pid == os.getpid()
    child.kill()
    child.wait()


def test_the_host_has_a_name_a_boot_and_a_namespace():
    name, boot, namespace = host_id()
    assert name == os.uname().nodename and len(boot) == 36 and namespace.startswith("pid:[")


def test_memory_of_its_own_grows_by_what_is_written_and_not_by_the_files_that_are_read(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(32 << 20))
    before = bytes_of_its_own(os.getpid())
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[::4096]) == 0
        assert bytes_of_its_own(os.getpid()) - before < 8 << 20
    with mmap.mmap(-1, 32 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as kept:
        kept.write(b"x" * len(kept))
        assert bytes_of_its_own(os.getpid()) - before > 24 << 20
