"""The phases of a start add up to its whole time, and only a launcher that starts once has a time."""

import gc

import pytest

from vitscale.base.host import Ancestor, Process
from vitscale.base.startup import Startup, importing, seconds_before, startup_of_this_process

RUNNER, NODE = ("python", "/opt/bin/deepspeed"), ("python", "-m", "deepspeed.launcher.launch")
SUPERVISE, SHELL, TORCHRUN = ("python", "launch/supervise.py"), ("bash",), ("python", "/opt/bin/torchrun")


def test_every_second_belongs_to_one_phase():
    now_s = [10.0]
    startup = Startup({"launcher": 4.0, "imports": 3.0}, clock=lambda: now_s[0])
    for phase, seconds in (("ranks", 0.5), ("engine", 2.004), ("ranks", 0.25)):
        now_s[0] += seconds
        startup.ends(phase)
    assert startup.as_record() == {"launcher": 4.0, "imports": 3.0, "ranks": 0.75, "engine": 2.0}
    assert startup.in_words() == "the start took 9.8 s: launcher 4.0, imports 3.0, ranks 0.8, engine 2.0"


@pytest.mark.parametrize(
    ("above", "before"),
    [
        ([NODE, RUNNER, SHELL], {"launcher": 20.0, "imports": 5.0}),
        ([NODE, RUNNER, SUPERVISE, SHELL], {"launcher": 20.0, "imports": 5.0}),  # it has lived through other starts
        ([NODE, SHELL], {"launcher": 10.0, "imports": 5.0}),  # the runner is on another host
        ([TORCHRUN, SHELL], {"imports": 5.0}),
        ([], {"imports": 5.0}),
    ],
)
def test_the_launcher_counts_from_its_own_start(above, before):
    chain = [Ancestor(process=Process(pid=1 + n, started_ticks=0), argv=argv) for n, argv in enumerate(above)]
    assert seconds_before(Process(pid=0, started_ticks=0), chain, age_s=lambda process: 5.0 + 10.0 * process.pid) == before


def test_a_process_knows_how_old_it_is():
    assert startup_of_this_process().seconds["imports"] > 0


def test_loading_modules_is_not_interrupted_by_garbage_collection_and_what_follows_is():
    with pytest.raises(ImportError), importing():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled() and gc.get_freeze_count() > 0
    gc.unfreeze()
