"""Asked to stop, a run saves at the end of its step and loses none; the same command continues it as if nothing had been.

A few cells of a table: `python -m tests.measure.stopping` is the whole, with the real launcher.
"""

import os
import signal
import time

import pytest

from tests.helpers import stopping
from tests.helpers.program import curve, run, start
from tests.helpers.stopping import ARGUMENTS, ENDLESS, STEPS, asked_to_stop, is_undisturbed, signal_to, stop_file

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    """The undisturbed run, by two ranks."""
    place = tmp_path_factory.mktemp("quiet")
    run("pretrain", "--run", place / "run", *ARGUMENTS, said=place / "said.txt", world=2)
    return place / "run"


@pytest.mark.parametrize(
    ("name", "rank", "workers"),
    [("SIGTERM", 1, 2), ("SIGUSR1", 0, 0)],
)
def test_a_signal_to_one_rank_saves_stops_all_and_loses_no_step(tmp_path, quiet, name, rank, workers):
    place = tmp_path / "run"
    more = f"data.workers={workers}"
    outcome = asked_to_stop(place, signal_to(rank, name), more, said=tmp_path / "a.txt")
    assert outcome.codes == [76, 76], (tmp_path / "a.txt").read_text()
    assert outcome.steps_lost == 0 and 3 <= outcome.saved < STEPS
    assert outcome.status["phase"] == "stopped" and outcome.status["step"] == outcome.saved
    assert outcome.status["reason"] == f"{name} came to rank {rank}"
    assert outcome.alive == []
    said = run("pretrain", "--run", place, *ARGUMENTS, more, said=tmp_path / "b.txt", world=2)
    assert f"continuing after step {outcome.saved}" in said
    assert is_undisturbed(place, quiet) and len(curve(place)) == STEPS


def test_files_save_and_stop(tmp_path, quiet):
    """`save` saves without stopping, and what was to be kept is marked; `stop` stops."""
    place = tmp_path / "run"

    def ask(program) -> None:
        (place / "save").write_text("keep\n")
        limit_s = time.monotonic() + 60
        while (place / "save").exists():
            time.sleep(0.01)
            assert time.monotonic() < limit_s, program.text
        (place / "stop").touch()

    outcome = asked_to_stop(place, ask, ENDLESS, said=tmp_path / "a.txt")
    assert outcome.codes == [76, 76] and outcome.steps_lost == 0, (tmp_path / "a.txt").read_text()
    assert "asked for it" in outcome.status["reason"]
    (kept,) = (place / "checkpoints").glob("*.keep")
    assert kept.with_suffix("").is_dir() and kept.with_suffix("").name != f"step-{outcome.saved:08d}"
    assert not (place / "stop").exists() and is_undisturbed(place, quiet)


def test_the_time_limit_is_kept_and_the_next_start_goes_on(tmp_path, quiet):
    place = tmp_path / "run"
    first = asked_to_stop(place, stopping.nothing, ENDLESS, "run.stop_after=8s", said=tmp_path / "a.txt", steps=1)
    assert first.codes == [76, 76] and first.steps_lost == 0, (tmp_path / "a.txt").read_text()
    assert "time limit" in first.status["reason"]
    second = asked_to_stop(place, stop_file(place), ENDLESS, "run.stop_after=0", said=tmp_path / "b.txt")
    assert second.codes == [76, 76] and second.saved >= first.saved + 3
    assert is_undisturbed(place, quiet)


def test_a_second_launcher_is_refused_and_may_take_over_from_a_dead_one(tmp_path, quiet):
    place = tmp_path / "run"
    arguments = ["--run", place, *ARGUMENTS, ENDLESS]
    first = start("pretrain", *arguments, "run.save_every=2", said=tmp_path / "a.txt", world=2)
    stopping.wait_for_steps(place, 3, first)
    said = run("pretrain", *arguments, said=tmp_path / "b.txt", code=3)
    assert f"is being trained by process {first.pids[0]} on" in said and said.count("error:") == 1
    os.kill(first.pids[0], signal.SIGKILL)
    os.kill(first.pids[1], signal.SIGKILL)
    outcome = asked_to_stop(place, stop_file(place), ENDLESS, said=tmp_path / "c.txt")  # the dead were not waited for
    assert first.wait() == [-9, -9] and outcome.codes == [76, 76]
    assert "is gone; this process takes over" in (tmp_path / "c.txt").read_text()
    assert is_undisturbed(place, quiet)
