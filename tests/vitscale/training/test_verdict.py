"""Laws of the verdict: whoever waits in a collective is not late, and one rank of each host speaks."""

import dataclasses
import itertools

import pytest

from vitscale.training.peers import Peer
from vitscale.training.verdict import PHASES, Report, read_reports, report_name, verdict_on

HOSTS = ("alpha", "alpha", "beta", "beta")
PEERS = tuple(Peer(rank=rank, host=host, process=None) for rank, host in enumerate(HOSTS))
WAITING = Report(
    rank=0, host="", pid=1, step=7, micro_batch=1, phase="backward", seconds=9.6, waits_in="all_reduce", workers=((5, "alive"),)
)


def reports(**of_rank: dict) -> dict[int, Report]:
    """All wait in backward of step 7, but for what is said of r0, r1, ..."""
    return {
        rank: dataclasses.replace(WAITING, rank=rank, host=host, **of_rank.get(f"r{rank}", {}))
        for rank, host in enumerate(HOSTS)
    }


@pytest.mark.parametrize("late", range(4))
@pytest.mark.parametrize("phase", ["data", "forward", "backward"])
def test_the_rank_that_does_not_wait_is_late(late, phase):
    verdict = verdict_on(reports(**{f"r{late}": {"phase": phase, "waits_in": ""}}), PEERS)
    assert verdict.late == (late,)
    assert verdict.sentence == (
        f"rank {late} on {HOSTS[late]} has been in {phase} of step 7 for 10 s while the others wait in backward of step 7"
    )
    assert verdict.speakers == {next(r for r in (0, 1) if r != late), next(r for r in (2, 3) if r != late)}
    assert verdict.writer == min(verdict.speakers)


def test_of_those_that_compute_the_one_furthest_back_is_late():
    """Under NCCL nobody is seen to wait: the host stands in the forward pass or in a read of the device."""
    seen = reports(
        r0={"phase": "optimizer", "waits_in": ""},
        r1={"phase": "optimizer", "waits_in": ""},
        r2={"phase": "forward", "micro_batch": 0, "waits_in": ""},
        r3={"phase": "data", "micro_batch": 1, "waits_in": ""},
    )
    assert verdict_on(seen, PEERS).late == (2,)


def test_a_silent_rank_is_late_whatever_the_others_do():
    seen = reports(r0={"phase": "data", "waits_in": ""})
    del seen[3]
    verdict = verdict_on(seen, PEERS)
    assert verdict.late == (3,)
    assert verdict.sentence.startswith("rank 3 on beta did not answer when step 7 had not ended in time")
    assert (verdict.speakers, verdict.writer) == ({0, 2}, 0)


def test_a_host_that_is_gone_is_named_by_its_ranks_and_the_other_speaks():
    seen = reports()
    del seen[0], seen[1]
    verdict = verdict_on(seen, PEERS)
    assert verdict.late == (0, 1) and "rank 0 on alpha, rank 1 on alpha did not answer" in verdict.sentence
    assert verdict.speakers == {2} and verdict.writer == 2


@pytest.mark.parametrize("ahead", [{}, {"r2": {"phase": "end"}}])
def test_where_all_wait_the_network_is_named(ahead):
    verdict = verdict_on(reports(**ahead), PEERS)
    assert verdict.late == () and "all 4 ranks wait for each other" in verdict.sentence
    assert "the network between alpha, beta is cut" in verdict.sentence


def test_nobody_is_late_where_all_stand_at_the_same_place():
    verdict = verdict_on(reports(**{f"r{rank}": {"waits_in": ""} for rank in range(4)}), PEERS)
    assert verdict.late == ()


def test_a_world_of_one_names_itself_and_its_stopped_worker():
    report = dataclasses.replace(WAITING, host="alpha", phase="data", waits_in="", workers=((5, "stopped"), (6, "alive")))
    verdict = verdict_on({0: report}, PEERS[:1])
    assert verdict.late == (0,) and verdict.speakers == {0}
    assert verdict.sentence == "rank 0 on alpha has been in data of step 7 for 10 s, its data worker 5 is stopped"


def test_many_late_ranks_are_counted():
    peers = tuple(Peer(rank=rank, host="alpha", process=None) for rank in range(9))
    verdict = verdict_on({8: dataclasses.replace(WAITING, rank=8, host="alpha")}, peers)
    assert "rank 0 on alpha, rank 1 on alpha, rank 2 on alpha and 5 more did not answer" in verdict.sentence


def test_a_step_only_moves_forward():
    order = [("data", 0), ("forward", 0), ("backward", 0), ("optimizer", 0), ("data", 1), ("backward", 1), ("end", 1)]
    order += [("evaluate", 0), ("evaluate", 5), ("save", 0), ("flush", 0)]
    places = [dataclasses.replace(WAITING, phase=phase, micro_batch=number).progress for phase, number in order]
    assert all(before < after for before, after in itertools.pairwise(places))
    assert dataclasses.replace(WAITING, step=8, phase="data", micro_batch=0).progress > places[-1]
    assert {phase for phase, _ in order} == set(PHASES)


def test_reports_come_back_from_their_files(tmp_path):
    for rank, report in reports().items():
        (tmp_path / report_name(rank)).write_text(report.as_text() + "Thread 0x1 (most recent call first):\n  File: x\n")
    (tmp_path / ".rank-00009.txt.tmp-1").write_text("half")
    (tmp_path / "rank-00008.txt").write_text("rank: 8\nhost")
    assert read_reports(tmp_path) == reports()
    assert read_reports(tmp_path / "none") == {}
