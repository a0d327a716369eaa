"""An expected error is one sentence and an exit code; only the rank that should speak speaks."""

import subprocess
import sys

import pytest

from vitscale.base import errors
from vitscale.base.errors import ExitCode, complain, nearest

SPEAKS = {
    "UsageError": (2, False),
    "EnvironmentFault": (3, False),
    "HostFault": (3, True),
    "TransientFault": (75, True),
    "BadDataError": (78, True),
    "StopRequested": (76, False),
    "LeaseLost": (75, False),
}


def test_exit_codes_are_the_published_ones():
    assert {code.name: int(code) for code in ExitCode} == {
        "DONE": 0,
        "USAGE": 2,
        "ENVIRONMENT": 3,
        "TRANSIENT": 75,
        "STOPPED": 76,
        "NO_PROGRESS": 77,
        "BAD_DATA": 78,
        "DIVERGED": 79,
    }


@pytest.mark.parametrize("name", SPEAKS)
def test_each_error_has_its_exit_code_and_its_speakers(name):
    error = getattr(errors, name)
    assert (int(error.exit_code), error.every_rank_speaks) == SPEAKS[name]


def end_of(error: str, **environment: str) -> subprocess.CompletedProcess:
    """A process whose main raises `error`; an exit handler that would hang shows that it is not waited for."""
    program = (
        "import atexit, time; from vitscale.base import errors; errors.SILENT_RANK_WAIT_S = 0.0\n"
        "atexit.register(time.sleep, 60)\n"
        f"def main(): raise errors.{error}('expected A, got B')\n"
        "print('before', end=''); errors.run_main(main)"
    )
    return subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONPATH": ":".join(sys.path), **environment}, capture_output=True, timeout=30
    )


@pytest.mark.parametrize(
    ("error", "environment", "code", "said"),
    [
        ("UsageError", {}, 2, True),
        ("UsageError", {"RANK": "0"}, 2, True),
        ("UsageError", {"RANK": "1"}, 2, False),
        ("UsageError", {"SLURM_PROCID": "3"}, 2, False),
        ("UsageError", {"OMPI_COMM_WORLD_RANK": "3"}, 2, False),
        ("UsageError", {"RANK": "0", "SLURM_PROCID": "3"}, 2, True),
        ("HostFault", {"RANK": "1"}, 3, True),
        ("StopRequested", {"RANK": "0"}, 76, False),
        ("LeaseLost", {"RANK": "1"}, 75, False),
    ],
)
def test_an_expected_error_ends_in_one_sentence_of_the_right_rank(error, environment, code, said):
    ended = end_of(error, **environment)
    assert ended.returncode == code
    assert ended.stderr == (b"error: expected A, got B\n" if said else b"")
    assert ended.stdout == b"before", "what was printed before must not be lost"


def test_a_defect_of_our_own_keeps_its_traceback():
    def main() -> None:
        raise KeyError("ours")

    with pytest.raises(KeyError):
        errors.run_main(main)


def test_a_silent_rank_waits_until_the_other_has_spoken(monkeypatch):
    acts: list[object] = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(errors.time, "sleep", acts.append)
    monkeypatch.setattr(errors, "_leave", acts.append)

    def main() -> None:
        raise errors.UsageError("x")

    errors.run_main(main)
    assert acts == [errors.SILENT_RANK_WAIT_S, ExitCode.USAGE]


def test_what_is_said_already_is_not_said_again_nor_waited_for(monkeypatch, capsys):
    acts: list[object] = []
    monkeypatch.setattr(errors.time, "sleep", acts.append)
    monkeypatch.setattr(errors, "_leave", acts.append)

    def main() -> None:
        raise errors.StopRequested("of a test")

    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        errors.run_main(main)
    assert acts == [ExitCode.STOPPED, ExitCode.STOPPED] and capsys.readouterr().err == ""


def test_nearest_names_a_close_word_and_nothing_else():
    assert nearest("blocks", ["block", "rock"]) == "; did you mean 'block'?"
    assert nearest("zzz", ["block", "rock"]) == ""


def test_trouble_goes_to_stderr(capsys):
    complain("checkpoint step-00000004 is not usable")
    assert capsys.readouterr() == ("", "checkpoint step-00000004 is not usable\n")
