"""Prove on your own machine that faults leave no trace: `python launch/chaos.py --kills 60`.

A small training runs undisturbed once per ZeRO stage. Then the same command is started, killed at a random moment or at a
named point, and started again, until it is finished; and so on until every kill is dealt. Each finished run must have the
losses, norms, learning rates, images and last weights of the undisturbed one, bit for bit, and every image of the order
exactly once; nothing may be left on the machine. Exit code 0: so it is. 1: it is not, and the table says where.

    python launch/chaos.py --kills 60                    20 kills per ZeRO stage 1, 2, 3
    python launch/chaos.py --kills 9 --real-launcher     started by `deepspeed`, not forked
    python launch/chaos.py --minutes 20                  one longer training with a fault a minute, memory watched
"""

import shutil
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch

from launch.arguments import Parser
from launch.datasets import EMBEDDED, open_dataset
from launch.forked import cluster_of
from launch.trials.attempts import forking, launching
from launch.trials.proof import Proof, Setup, Storm, kind_table, undisturbed
from launch.trials.soak import soak
from launch.trials.strikes import FAULTS, KILLS, STEP_TIMEOUT, Draws, Kind, Pace
from vitscale.base.errors import EnvironmentFault, UsageError, run_main
from vitscale.base.files import write_json
from vitscale.base.progress import Bar
from vitscale.config import all_keys
from vitscale.insight.timeline import AttemptBar, draw_attempts

SMALL = (
    "model.depth=2",
    "model.width=32",
    "model.heads=2",
    "optim.global_batch=24",
    "optim.micro_batch_max=6",
    "train.ema=[0.9]",
    "run.log_every=1",
    "run.parity=never",
)
"""The digits recipe made small; micro-batches are accumulated, and there is an average to lose."""
KILLS_DEFAULT = 12
STEP_TIMEOUT_S = 30
SHORT = ("train.length=24", "run.save_every=4", "run.eval_every=12")


def main() -> None:
    parser = Parser(description="Kill a small training again and again, and prove that its result is the undisturbed one.")
    parser.add_argument("--kills", type=int, metavar="N", help=f"kills over all stages (default {KILLS_DEFAULT})")
    parser.add_argument("--minutes", type=float, metavar="M", help="instead: one training of about M minutes under faults")
    parser.add_argument("--fault-every", type=float, default=60.0, metavar="S", help="with --minutes: seconds between faults")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn")
    parser.add_argument("--stage", metavar="1,2,3", help="ZeRO stages (default 1,2,3; with --minutes one, 2)")
    parser.add_argument("--world", type=int, default=2, metavar="N", help="ranks on this machine (default 2)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="data workers of each rank (default 2)")
    parser.add_argument("--real-launcher", action="store_true", help="start by `deepspeed` instead of forking: slow, and whole")
    parser.add_argument("--out", type=Path, metavar="DIR", help="a new directory that keeps runs, what was said, and a picture")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write down every attempt")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    stages = check(args)
    torch.set_num_threads(1)  # ranks are forked, and a pool of threads does not survive it
    out = (args.out or Path(tempfile.mkdtemp(prefix="vitscale-chaos-"))).resolve()
    out.mkdir(parents=True, exist_ok=True)
    if args.minutes is not None:
        result = soak(
            lambda name, length: setup_of(args, stages[0], out / name, length, kinds=soak_kinds()),
            draws_of=lambda pace, every_s: draws_of(args, stages[0], pace, soak_kinds(), every_s=every_s),
            minutes=args.minutes,
            fault_every_s=args.fault_every,
        )
        proofs, table, record = [result.proof], result.table(), result.as_record()
    else:
        proofs = kill(args, stages, out)
        table, record = kind_table(proofs), {"stages": [proof.as_record() for proof in proofs]}
    is_good = all(proof.passed() for proof in proofs)
    print(table, flush=True)
    if args.json is not None:
        write_json(args.json, {"command": sys.argv, "passed": is_good, **record})
    draw_attempts(bars_of(proofs), out / "attempts.png")
    if is_good and args.out is None:
        shutil.rmtree(out)
    else:
        print(f"runs, what they said and a picture of all attempts: {out}")
    if not is_good:
        raise SystemExit(1)


def check(args: Namespace) -> list[int]:
    """The ZeRO stages asked for. Raises UsageError for wrong words, EnvironmentFault where the tool cannot work."""
    if args.kills is not None and args.minutes is not None:
        raise UsageError("give one of --kills and --minutes, not both")
    given = [number for number in (args.world, args.kills, args.minutes, args.fault_every) if number is not None]
    if min(given) <= 0 or args.workers < 0:
        raise UsageError("expected --kills, --minutes, --fault-every and --world above 0, and --workers of at least 0")
    words = (args.stage or ("2" if args.minutes else "1,2,3")).split(",")
    if any(word not in ("0", "1", "2", "3") for word in words) or (args.minutes and len(words) > 1):
        raise UsageError(f"expected --stage with ZeRO stages such as 1,2,3, with --minutes one of them, got {args.stage!r}")
    if args.out is not None and args.out.exists() and any(args.out.iterdir()):
        raise UsageError(f"--out {args.out} is not empty; name a new directory: a run that is there would be continued")
    if sys.platform != "linux":
        raise EnvironmentFault(f"processes are found through /proc, which {sys.platform} has not; start it on Linux")
    if torch.cuda.is_available() and not args.real_launcher:
        raise UsageError(
            "ranks that use a GPU cannot be forked from a process that has looked for one; add --real-launcher, or hide the "
            "GPUs: CUDA_VISIBLE_DEVICES= python launch/chaos.py"
        )
    return [int(word) for word in dict.fromkeys(words)]


def setup_of(args: Namespace, stage: int, place: Path, length: Sequence[str], *, kinds: Sequence[Kind] = KILLS) -> Setup:
    """How attempts of a stage are started. The embedded digits are built once, in the directory of all."""
    data = place.parent / "data"
    for name in ("train", "eval"):
        open_dataset(f"{EMBEDDED}{name}", run=place.parent, cluster=cluster_of(0, 1, 0), cache_dir=place.parent)
    timeout = [f"{STEP_TIMEOUT}={STEP_TIMEOUT_S}"] if "stop of one rank" in kinds else []
    arguments = [
        *SMALL,
        *length,
        f"data.path={data / 'train'}",
        f"data.eval_path={data / 'eval'}",
        f"data.workers={args.workers}",
        f"ds.zero_optimization.stage={stage}",
        *timeout,
        *args.overrides,
    ]
    forked = forking(args.world, arguments)
    return Setup(
        stage=stage,
        place=place,
        start=launching(args.world, arguments) if args.real_launcher else forked,
        start_undisturbed=launching(args.world, arguments) if torch.cuda.is_available() else forked,
    )


def draws_of(
    args: Namespace, stage: int, pace: Pace, kinds: Sequence[Kind] = KILLS, *, every_s: float | None = None, first: int = 0
) -> Draws:
    seed = f"{args.seed} {stage}"
    return Draws(seed, pace=pace, world=args.world, workers=args.workers, kinds=kinds, every_s=every_s, first=first)


def soak_kinds() -> tuple[Kind, ...]:
    """A stopped rank is only noticed where steps have a time limit."""
    return tuple(kind for kind in FAULTS if kind != "stop of one rank" or STEP_TIMEOUT in all_keys())


def kill(args: Namespace, stages: Sequence[int], out: Path) -> list[Proof]:
    """All kills, shared out over the stages; the kinds go on from one stage to the next."""
    kills = KILLS_DEFAULT if args.kills is None else args.kills
    proofs: list[Proof] = []
    with Bar(total=kills, what="kills", unit="kill") as bar:
        for number, stage in enumerate(stages):
            share = kills // len(stages) + (number < kills % len(stages))
            if not share:
                continue
            setup = setup_of(args, stage, out / f"stage-{stage}", SHORT)
            reference, pace = undisturbed(setup)
            storm = Storm(setup, reference, draws_of(args, stage, pace, first=bar.done))
            proofs.append(storm.proof)
            for _ in range(share):
                attempt = storm.deal()
                bar.reach(bar.done + 1, note=f"stage {stage}: {attempt.strike.in_words() if attempt.strike else ''}")
            storm.finish()
    return proofs


def bars_of(proofs: Sequence[Proof]) -> list[AttemptBar]:
    bars = []
    for proof in proofs:
        began_s: dict[str, float] = {}
        for run, attempt in proof.attempts:
            from_s = attempt.at_s - began_s.setdefault(run, attempt.at_s)
            kind = attempt.strike.kind if attempt.strike is not None and attempt.has_hit else ""
            bars.append(
                AttemptBar(
                    row=f"stage {proof.stage}, {run}",
                    from_s=from_s,
                    to_s=from_s + attempt.took_s,
                    kind=kind,
                    last_step=attempt.last_step,
                )
            )
    return bars


if __name__ == "__main__":
    run_main(main)
