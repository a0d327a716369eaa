"""The wrapper asks by a file instead of a signal, leaves no process behind, and ends with what the run directory says."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.supervise import newest_checkpoint, verdict
from vitscale.base.host import is_alive, process_of

ROOT = Path(__file__).resolve().parents[2]

# A training that a launcher has started: it saves when asked to by the file, and cannot be told by signals.
TRAINING = """
import json, os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
run = pathlib.Path(sys.argv[1])
(run / "pid").write_text(str(os.getpid()))
while not (run / "stop").exists():
    time.sleep(0.02)
reason = (run / "stop").read_text().strip()
(run / "stop").unlink()
(run / "status.json").write_text(json.dumps({"phase": "stopped", "reason": reason}))
os._exit(76)
"""


def start(run: Path, *command: str, restarts: int = 0, leftovers_s: float = 60.0) -> subprocess.Popen:
    """supervise.py in a process of its own, with shorter waits."""
    run.mkdir(exist_ok=True)
    program = (
        f"import sys; import launch.supervise as s; s.LEFTOVERS_S = {leftovers_s}; s.POLL_S = 0.02; s.PAUSE_MAX_S = 0.01\n"
        "s.run_main(s.main)"
    )
    words = [sys.executable, "-c", program, str(run), "--restarts", str(restarts), "--", *command]
    return subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def ended(child: subprocess.Popen) -> tuple[int, str]:
    _, said = child.communicate(timeout=60)
    return child.returncode, said


def wait_for(path: Path) -> str:
    limit_s = time.monotonic() + 30
    while not (path.is_file() and path.read_text()):
        assert time.monotonic() < limit_s
        time.sleep(0.01)
    return path.read_text()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_becomes_the_stop_file_and_a_second_one_is_harmless(tmp_path, name):
    child = start(tmp_path, sys.executable, "-c", TRAINING, str(tmp_path))
    wait_for(tmp_path / "pid")
    for _ in range(2):
        child.send_signal(signal.Signals[name])
    code, said = ended(child)
    assert code == 76, said
    assert json.loads((tmp_path / "status.json").read_text())["reason"] == f"{name} came to supervise.py"
    assert f"{name} heard" in said and "stopped (76)" in said and not (tmp_path / "stop").exists()


def test_ranks_whose_launcher_died_are_waited_for(tmp_path):
    """The launcher ends with 0 because of a signal; the code comes from the run directory."""
    launcher = f"{sys.executable} -c '{TRAINING}' {tmp_path} & while [ ! -s {tmp_path}/pid ]; do sleep 0.02; done; exit 0"
    child = start(tmp_path, "sh", "-c", launcher)
    rank = process_of(int(wait_for(tmp_path / "pid")))
    time.sleep(0.3)
    assert is_alive(rank) and child.poll() is None
    child.send_signal(signal.SIGTERM)
    code, said = ended(child)
    assert code == 76 and "1 processes of it go on" in said and not is_alive(rank)


def test_what_does_not_end_is_killed(tmp_path):
    command = f"trap '' TERM; (trap '' TERM INT; sleep 600 & echo $! > {tmp_path}/pid; wait) & exit 0"
    code, said = ended(start(tmp_path, "sh", "-c", command, leftovers_s=0.5))
    assert code == 75 and "killing processes" in said
    assert process_of(int(wait_for(tmp_path / "pid"))) is None


def test_a_stop_file_for_a_command_that_never_looked_is_taken_away_again(tmp_path):
    child = start(tmp_path, "sh", "-c", f"echo 1 > {tmp_path}/pid; while [ ! -e {tmp_path}/stop ]; do sleep 0.02; done; exit 9")
    wait_for(tmp_path / "pid")
    child.send_signal(signal.SIGUSR1)
    code, said = ended(child)
    assert code == 9 and not (tmp_path / "stop").exists(), said


# Counts its starts, and commits a checkpoint at those that are named.
COUNTING = """
import pathlib, sys
run, saves, code = pathlib.Path(sys.argv[1]), sys.argv[2].split(","), int(sys.argv[3])
starts = len(list(run.glob("start-*"))) + 1
(run / f"start-{starts}").touch()
if str(starts) in saves:
    (run / "checkpoints" / f"step-{starts:08d}").mkdir(parents=True)
if str(starts) + "!" in saves:
    (run / "FINISHED.json").write_text("{}")
    code = 0
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("saves", "code", "restarts", "starts", "ends_with"),
    [
        ("", 75, 0, 1, 75),
        ("", 75, 10, 4, 77),  # the first start and three restarts, none with a checkpoint
        ("1", 75, 10, 4, 77),
        ("1,3,5", 75, 10, 8, 77),
        ("1,2,3", 75, 2, 3, 75),  # no restart is left
        ("1,2!", 75, 10, 2, 0),
        ("1,2!", 1, 10, 2, 0),  # after a crash
        ("1", 1, 0, 1, 1),
        ("1", 2, 10, 1, 2),  # a wrong word stays one
        ("1", 3, 10, 1, 3),
        ("1", 78, 10, 1, 78),
        ("1", 79, 10, 1, 79),
        ("1,2!", 0, 10, 2, 0),  # a launcher says 0, but nothing is finished
    ],
)
def test_restarts_end_with_progress_or_with_77(tmp_path, saves, code, restarts, starts, ends_with):
    child = start(tmp_path, sys.executable, "-c", COUNTING, str(tmp_path), saves, str(code), restarts=restarts)
    got, said = ended(child)
    assert (len(list(tmp_path.glob("start-*"))), got) == (starts, ends_with), said


def test_the_wrapper_is_asked_between_two_starts(tmp_path):
    child = start(tmp_path, "sh", "-c", f"kill -TERM $PPID; echo x >> {tmp_path}/starts; exit 75", restarts=5)
    code, said = ended(child)
    assert code == 75 and (tmp_path / "starts").read_text() == "x\n", said


@pytest.mark.parametrize(
    ("code", "told", "finished", "means"),
    [
        (0, {"phase": "finished"}, True, 0),
        (1, {"phase": "finished"}, True, 0),  # what a launcher says after the marker is written
        (2, {"phase": "finished"}, True, 2),  # the finished run was asked for with another configuration
        (0, {"phase": "training"}, False, 75),
        (0, {"phase": "stopped"}, False, 76),
        (1, {"phase": "stopped"}, False, 76),
        (143, {"phase": "stopped"}, False, 76),
        (-15, {"phase": "stopped"}, False, 76),
        (76, {"phase": "stopped"}, False, 76),
        (-9, {"phase": "training"}, False, 75),
        (247, {"phase": "training"}, False, 75),
        (75, {"phase": "hung"}, False, 75),
        (1, {"phase": "training"}, False, 1),
        (78, {"phase": "training"}, False, 78),
    ],
)
def test_the_run_directory_decides_what_an_exit_code_means(tmp_path, code, told, finished, means):
    (tmp_path / "status.json").write_text(json.dumps(told))
    if finished:
        (tmp_path / "FINISHED.json").write_text("{}")
    assert verdict(tmp_path, code, b"") == means
    if told == {"phase": "stopped"}:  # by an earlier start: it says nothing about this one
        assert verdict(tmp_path, -15, (tmp_path / "status.json").read_bytes()) == 75


def test_the_newest_checkpoint_is_a_committed_one(tmp_path):
    assert newest_checkpoint(tmp_path) == -1
    for name in ("step-00000010", "step-00000020.partial", "step-00000030.bad-1", "step-00000009"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000040.keep").touch()
    assert newest_checkpoint(tmp_path) == 10


@pytest.mark.parametrize(
    "words", [["run"], ["run", "--"], ["run", "--restarts", "-1", "--", "true"], ["run", "--", "/no/such"]]
)
def test_wrong_words_are_one_sentence(tmp_path, words):
    got = subprocess.run(
        [sys.executable, "-m", "launch.supervise", *words], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert got.returncode == 2 and got.stderr.startswith("error: ") and "Traceback" not in got.stderr


def test_the_wrapper_needs_no_torch():
    code = "import sys, launch.supervise; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=30, env={**os.environ, "PYTHONPATH": str(ROOT)})
