"""Two hosts under `deepspeed --hostfile`: no fault of one leaves the other waiting, and the same command goes on.

One test runs by default; `python -m tests.measure.two_hosts` does all and prints a table.
"""

import pytest

from tests.helpers.program import curve, run
from tests.multinode.stories import NAMES, RUN_ARGUMENTS, cut_cable
from tests.multinode.two_hosts import two_hosts, what_is_missing
from vitscale.base import lease

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(what_is_missing()), reason=f"two hosts need {what_is_missing()}")]


def test_a_cut_cable_ends_both_hosts_and_one_host_goes_on(tmp_path, monkeypatch):
    quiet, stormy = tmp_path / "quiet", tmp_path / "stormy"
    with two_hosts(tmp_path / "hosts") as hosts:
        story = cut_cable(hosts, stormy, said=tmp_path / "cut.txt")
    assert story.ended_after_s < 30 and not story.left_over, story
    assert "the network between node1, node2 is cut" in story.text or "rank 1 on node2 did not answer" in story.text, story.text
    assert "Traceback" not in story.text, story.text
    arguments = [*RUN_ARGUMENTS, "run.step_timeout=60"]
    run("pretrain", "--run", quiet, *arguments, said=tmp_path / "quiet.txt", world=2, cores=2)
    monkeypatch.setattr(lease, "DEAD_AFTER_S", 20.0)  # how long that is, is a law of test_lease; here it is only waited for
    run("pretrain", "--run", stormy, *arguments, said=tmp_path / "again.txt", world=2, cores=2)
    assert curve(stormy, *NAMES) == curve(quiet, *NAMES)
