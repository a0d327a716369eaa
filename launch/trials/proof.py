"""One ZeRO stage under a storm: the undisturbed run, the runs that were struck, and whether they are equal.

PLACE/
  undisturbed/          the reference, a run directory
  run-1/ run-2/ …       run directories that were struck STRIKES_PER_RUN times each, then left to finish
  said/                 what every attempt said
  temporary/            the temporary directory of all ranks: empty in the end
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launch.datasets import open_datasets
from launch.forked import cluster_of
from launch.trials.attempts import Start
from launch.trials.evidence import Evidence, differences, evidence_of
from launch.trials.leftovers import forsaken, shared_memory, temporary_files
from launch.trials.storm import Attempted, Look, attempt_once, is_finished, newest_checkpoint, unwatched
from launch.trials.strikes import Draws, Kind, Pace, Strike
from vitscale.base.errors import EnvironmentFault, VitscaleError
from vitscale.base.files import read_json
from vitscale.config import steps_of
from vitscale.training.metrics import read_lines
from vitscale.training.rundir import stored_config

STRIKES_PER_RUN = 5
MISSES_MAX = 20
"""Strikes in a row that may come too late before the storm is given up."""
QUIET_ATTEMPTS_MAX = 3
"""Attempts that nothing is done to, before a run counts as one that does not finish."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How attempts of one stage are started, and where everything goes."""

    stage: int
    place: Path
    start: Start
    start_undisturbed: Start

    def __post_init__(self) -> None:
        for directory in (self.place / "said", self.temporary):
            directory.mkdir(parents=True, exist_ok=True)

    @property
    def temporary(self) -> Path:
        return self.place / "temporary"

    @property
    def marker(self) -> Path:
        """Made by the fault point that hit."""
        return self.place / "hit"

    def said(self, run: Path, number: int) -> Path:
        return self.place / "said" / f"{run.name}-attempt-{number:03d}.txt"


@dataclass(kw_only=True)
class Proof:
    """What was done at one stage, and what came of it."""

    stage: int
    reference: Evidence
    attempts: list[tuple[str, Attempted]] = field(default_factory=list)
    """With the name of the run."""
    verdicts: dict[str, list[str]] = field(default_factory=dict)
    """What is wrong, by the name of the run; an empty list: it is equal to the undisturbed one."""
    left: list[str] = field(default_factory=list)
    """What was left on the machine."""

    def passed(self) -> bool:
        hung = any(attempt.has_hung for _, attempt in self.attempts)
        return bool(self.verdicts) and not (hung or self.left or any(self.verdicts.values()))

    def strikes(self, kind: Kind | None = None) -> list[tuple[str, Attempted]]:
        """The attempts that were hit, by any fault or by one kind."""
        return [
            (run, attempt)
            for run, attempt in self.attempts
            if attempt.has_hit and attempt.strike is not None and kind in (None, attempt.strike.kind)
        ]

    def as_record(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "passed": self.passed(),
            "steps": len(self.reference.steps),
            "weights_sha256": self.reference.weights_sha256,
            "account": asdict(self.reference.account),
            "attempts": [{"run": run, **attempt.as_record()} for run, attempt in self.attempts],
            "differences": self.verdicts,
            "left": self.left,
        }


def undisturbed(setup: Setup, look: Look = unwatched) -> tuple[Evidence, Pace]:
    """The reference of a stage and how it went. Raises EnvironmentFault when even this does not finish."""
    run = setup.place / "undisturbed"
    began_at_unix_s = time.time()
    attempt = _attempt(setup, run, None, number=1, start=setup.start_undisturbed, look=look)
    if not is_finished(run):
        raise EnvironmentFault(
            f"the undisturbed run ended with {attempt.codes} instead of finishing; what it said is in {setup.said(run, 1)}"
        )
    evidence = evidence_of(run)
    if wrong := differences(evidence, evidence):
        raise EnvironmentFault(f"the undisturbed run {run} is wrong by itself: {'; '.join(wrong)}")
    return evidence, pace_of(run, began_at_unix_s=began_at_unix_s)


def pace_of(run: Path, *, began_at_unix_s: float) -> Pace:
    """How a finished run of one attempt went."""
    config = stored_config(run)
    assert config is not None  # it is finished
    _, manifests, _ = open_datasets(config, run=run, cluster=cluster_of(0, 1, 0))
    times = [line["at_unix_s"] for line in read_lines(run / "metrics.jsonl") if "loss" in line]

    def every(length: int | str) -> int:
        images, batch = sum(manifest.images for manifest in manifests), config.optim.global_batch
        # 0 stands for: only after the last step.
        return steps_of(length, global_batch=batch, epoch_images=images, total_steps=len(times)) or len(times)

    return Pace(
        total_steps=len(times),
        save_every=every(config.run.save_every),
        eval_every=every(config.run.eval_every),
        micro_batches=read_json(run / "ds_config.json")["gradient_accumulation_steps"],
        start_s=times[0] - began_at_unix_s,
        step_s=(times[-1] - times[0]) / max(1, len(times) - 1),
    )


class Storm:
    """Strikes at one stage, one after the other; `proof` is what is known by now."""

    def __init__(self, setup: Setup, reference: Evidence, draws: Draws, *, strikes_per_run: int = STRIKES_PER_RUN) -> None:
        self.proof = Proof(stage=setup.stage, reference=reference)
        self._setup, self._draws, self._strikes_per_run = setup, draws, strikes_per_run
        self._shared_before = shared_memory()
        self._began_s = time.monotonic()
        self._runs = 0
        self._open_run()

    def _open_run(self) -> None:
        self._runs += 1
        self._run = self._setup.place / f"run-{self._runs}"
        self._attempts = self._strikes = 0

    def deal(self, look: Look = unwatched) -> Attempted:
        """Strike until one has hit: some come too late, when the run has finished."""
        for _ in range(MISSES_MAX):
            attempt = self.strike(look)
            if attempt.has_hit:
                return attempt
        raise EnvironmentFault(
            f"{MISSES_MAX} strikes in a row came too late at ZeRO stage {self._setup.stage}; lengthen train.length"
        )

    def strike(self, look: Look = unwatched) -> Attempted:
        """One attempt with one strike. A run that has finished, or has had its share of strikes, is judged."""
        attempt = self._once(self._draws.next(newest_checkpoint(self._run), self._setup.marker), look)
        self._strikes += attempt.has_hit
        if is_finished(self._run):
            self._judge()
        elif not attempt.has_hit:
            self.give_up(f"attempt {self._attempts} ended with {attempt.codes} although nothing was done to it")
        elif self._strikes == self._strikes_per_run:
            self.finish()
        return attempt

    def finish(self, look: Look = unwatched) -> None:
        """Let the run finish that was begun, if any, and judge it."""
        if not self._attempts:
            return
        for _ in range(QUIET_ATTEMPTS_MAX):
            attempt = self._once(None, look)
            if is_finished(self._run):
                return self._judge()
        self.give_up(
            f"not finished after {QUIET_ATTEMPTS_MAX} attempts that nothing was done to, the last with {attempt.codes}"
        )

    def _once(self, strike: Strike | None, look: Look) -> Attempted:
        self._attempts += 1
        began_s = time.monotonic()
        attempt = _attempt(self._setup, self._run, strike, number=self._attempts, start=self._setup.start, look=look)
        attempt.at_s = began_s - self._began_s
        self.proof.attempts.append((self._run.name, attempt))
        self.proof.left += [f"{self._run.name}, attempt {self._attempts}: {what}" for what in attempt.left]
        return attempt

    def _judge(self) -> None:
        try:
            self.proof.verdicts[self._run.name] = differences(self.proof.reference, evidence_of(self._run))
        except VitscaleError as error:
            self.proof.verdicts[self._run.name] = [str(error)]
        self.proof.left += left_in_files(self._run, self._setup.temporary)
        self.proof.left += forsaken(shared_memory() - self._shared_before)
        self._open_run()

    def give_up(self, why: str) -> None:
        """Judge the present run without its end, and leave it as it is."""
        self.proof.verdicts[self._run.name] = [why]
        self._open_run()


def left_in_files(run: Path, temporary: Path) -> list[str]:
    """What was only meant to be there for a while, and what is in the temporary directory of the ranks."""
    return [*temporary_files(run), *sorted(map(str, temporary.iterdir()))]


def _attempt(setup: Setup, run: Path, strike: Strike | None, *, number: int, start: Start, look: Look) -> Attempted:
    return attempt_once(
        start,
        run,
        strike,
        said=setup.said(run, number),
        marker=setup.marker,
        env={"TMPDIR": str(setup.temporary)},
        look=look,
    )


def kind_table(proofs: Sequence[Proof]) -> str:
    """One row per kind of fault, and a sentence per stage."""
    kinds = list(dict.fromkeys(attempt.strike.kind for proof in proofs for _, attempt in proof.strikes() if attempt.strike))
    rows = [("fault", "number", "ended", "equal")]
    for kind in [*kinds, None]:
        hits = [(proof, run, attempt) for proof in proofs for run, attempt in proof.strikes(kind)]
        ended = [attempt for _, _, attempt in hits if not attempt.has_hung]
        equal = [run for proof, run, _ in hits if proof.verdicts.get(run) == []]
        rows.append((kind or "all", str(len(hits)), str(len(ended)), str(len(equal))))
    width = max(len(row[0]) for row in rows)
    lines = [f"{name:<{width}}  {number:>6}  {ended:>6}  {equal:>6}" for name, number, ended, equal in rows]
    return "\n".join([*lines, *(sentence for proof in proofs for sentence in _sentences(proof))])


def _sentences(proof: Proof) -> list[str]:
    account, weights = proof.reference.account, proof.reference.weights_sha256["weights"]
    equal = sum(not wrong for wrong in proof.verdicts.values())
    said = [
        f"ZeRO stage {proof.stage}: {equal} of {len(proof.verdicts)} runs equal to the undisturbed one in "
        f"{len(proof.reference.steps)} steps and the weights {weights[:16]}; of {account.due} images each, "
        f"{'0 lost, 0 twice' if equal == len(proof.verdicts) else 'see below'}; {len(proof.left)} things left behind"
    ]
    said += [f"  {run}: {'; '.join(wrong)}" for run, wrong in proof.verdicts.items() if wrong]
    return said + [f"  left: {what}" for what in proof.left]
