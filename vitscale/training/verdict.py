"""Which rank is late? What the ranks of a hung run report about themselves, and the one answer that follows. Pure.

A rank that reports nothing is late: it is stopped, or its host is cut off. Where all have reported, the late one is not among
those that wait in a collective, and has got least far. Where all wait, the network does not carry what they sent.
"""

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vitscale.training.peers import Peer

PHASES = ("data", "forward", "backward", "optimizer", "end", "evaluate", "save", "flush")
"""Of a step, in their order."""
NAMED = 3
"""Late ranks that a sentence names."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Where one rank is, by its own words."""

    rank: int
    host: str
    pid: int
    step: int
    micro_batch: int
    phase: str
    seconds: float
    """Since it entered the phase."""
    waits_in: str
    """Collective it waits in; empty: in none that can be seen."""
    workers: tuple[tuple[int, str], ...]
    """Process id and state of its data workers: alive, stopped or dead."""

    def as_text(self) -> str:
        """Lines `name: value`, then an empty one."""
        return "".join(f"{name}: {json.dumps(value)}\n" for name, value in dataclasses.asdict(self).items()) + "\n"

    @property
    def progress(self) -> tuple[int, int, int]:
        order = PHASES.index(self.phase)
        if order < PHASES.index("end"):  # comes again with each micro-batch
            return self.step, 0, self.micro_batch * len(PHASES) + order
        return self.step, order, self.micro_batch

    @property
    def place(self) -> str:
        return f"{self.phase} of step {self.step}"

    def bad_workers(self) -> list[str]:
        return [f"data worker {pid} is {state}" for pid, state in self.workers if state != "alive"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    late: tuple[int, ...]
    """Ranks; none where all wait for each other."""
    sentence: str
    speakers: frozenset[int]
    """One rank of each host that can speak: if possible no late one."""
    writer: int
    """The speaker that writes it down."""


def report_name(rank: int) -> str:
    return f"rank-{rank:05d}.txt"


def read_reports(directory: Path) -> dict[int, Report]:
    """The reports that are there, by rank."""
    reports = {}
    for path in sorted(directory.glob("rank-*.txt")):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # what cannot be read has not been said
            report = _parsed(path.read_text())
            reports[report.rank] = report
    return reports


def _parsed(text: str) -> Report:
    pairs = (line.split(": ", 1) for line in text.partition("\n\n")[0].splitlines())
    values = {name: json.loads(value) for name, value in pairs}
    return Report(**{**values, "workers": tuple((pid, state) for pid, state in values["workers"])})


def verdict_on(reports: Mapping[int, Report], peers: Sequence[Peer]) -> Verdict:
    """The same on every rank that has the same reports."""
    missing = [peer.rank for peer in peers if peer.rank not in reports]
    late = tuple(missing or _behind(list(reports.values()), world=len(peers)))
    hosts: dict[str, int] = {}
    for rank in sorted(reports, key=lambda rank: (rank in late, rank)):
        hosts.setdefault(reports[rank].host, rank)
    furthest = max(reports.values(), key=lambda report: report.progress)
    if missing:
        sentence = (
            f"{_names(late, peers)} did not answer when step {furthest.step} had not ended in time (stopped, or cut off from "
            f"the run directory), and the others wait in {furthest.place}"
        )
    elif late:
        report = reports[late[0]]
        causes = "".join(f", its {worker}" for worker in report.bad_workers())
        others = "" if len(late) == len(peers) else f" while the others wait in {furthest.place}"
        sentence = f"{_names(late, peers)} has been in {report.place} for {report.seconds:.0f} s{others}{causes}"
    else:
        several = sorted({peer.host for peer in peers})
        way = f"the network between {', '.join(several)} is cut" if len(several) > 1 else "a device or a connection is stuck"
        sentence = f"all {len(peers)} ranks wait for each other in {furthest.place} and none is behind: {way}"
    writer = next(iter(hosts.values()))
    return Verdict(late=late, sentence=sentence, speakers=frozenset(hosts.values()), writer=writer)


def _behind(reports: Sequence[Report], *, world: int) -> list[int]:
    """Ranks that the others wait for; none where they cannot be told apart."""
    pool = [report for report in reports if not report.waits_in]
    least = min((report.progress for report in pool), default=None)
    behind = [report.rank for report in pool if report.progress == least]
    return [] if len(behind) == world > 1 else behind


def _names(ranks: Sequence[int], peers: Sequence[Peer]) -> str:
    named = ", ".join(peers[rank].name for rank in ranks[:NAMED])
    return named + (f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else "")
