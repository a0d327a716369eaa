"""What becomes of a training that is asked to stop: every way to ask, and what the launchers make of it.

    python -m tests.measure.stopping [cost] [forked] [deepspeed] [torchrun] [accelerate]        prints all of it, or some

cost      what the agreement at the end of each step takes on two ranks
forked    two ranks started by the test program: signals, stop file and time limit, with and without data workers. After each
          the same command goes on to the end, and its curve is compared with that of an undisturbed run.
deepspeed, torchrun, accelerate
          launch/pretrain.py with two ranks under the real launcher, alone and under launch/supervise.py. One training without
          end is stopped by each way in turn and continued by the next; its curve is compared at the end.
"""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from launch.supervise import newest_checkpoint
from tests.helpers import stopping
from tests.helpers.program import Program, curve, run
from tests.helpers.ranks import free_port, run_ranks
from tests.helpers.stopping import ARGUMENTS, ENDLESS, STEPS, Outcome, asked_to_stop, is_undisturbed, outcome_of, signal_to
from vitscale.base.cluster import Cluster
from vitscale.base.host import Process, ancestors, descendants, process_of
from vitscale.base.launchers import program_of
from vitscale.training.steering import Steering

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(sys.executable).parent
LAUNCHERS = {
    "deepspeed": ("--num_gpus", "2", "--master_port"),
    "torchrun": ("--nproc_per_node", "2", "--master_port"),
    "accelerate": ("launch", "--multi_gpu", "--num_processes", "2", "--main_process_port"),
}
"""Each takes a free port behind these."""
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")
ALIVE_AFTER_S = 60.0


def main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts with & ignore it
    wanted = sys.argv[1:] or ["cost", "forked", *LAUNCHERS]
    if "cost" in wanted:
        print_cost()
    if not {"forked", *LAUNCHERS} & set(wanted):
        return
    with tempfile.TemporaryDirectory() as scratch:
        quiet = Path(scratch) / "quiet"
        run("pretrain", "--run", quiet, *ARGUMENTS, said=Path(scratch) / "quiet.txt", world=2)
        if "forked" in wanted:
            print_row("asked by", "workers", "exit codes", "saved", "steps lost", "alive", "reason in status.json", "continued")
            for row in forked_rows(Path(scratch), quiet):
                print_row(*row)
        for launcher in LAUNCHERS:
            if launcher in wanted:
                print_row(launcher, "to whom", "exit code", "after s", "saved", "steps lost", "alive after 60 s", "status.json")
                for row in launcher_rows(launcher, Path(scratch) / launcher, quiet):
                    print_row(*row)


def print_row(*cells: object) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


# ---- the price ------------------------------------------------------------------------------------------------------

CALLS = 3000


def print_cost() -> None:
    with tempfile.TemporaryDirectory() as directory:
        times_us = run_ranks(2, times_of_agreements, Path(directory))[0]
    median, ninety, ninety_nine = (statistics.quantiles(times_us, n=100)[share - 1] for share in (50, 90, 99))
    print(f"agreeing, 2 ranks, {CALLS} times: median {median:.0f} us, 90 % {ninety:.0f} us, 99 % {ninety_nine:.0f} us")


def times_of_agreements(cluster: Cluster, directory: Path) -> list[float]:
    """Microseconds of each agreement, with a launcher to look at and a look that is due at every tenth one."""
    me = process_of(os.getpid())
    assert me is not None
    clock = iter(range(10 * CALLS))
    steering = Steering(
        directory, rank=cluster.rank, total_steps=1 << 30, launchers=[me], clock=lambda: next(clock) / 10, seconds_left=1e9
    )
    steering.agree(0)
    times_us = []
    for step in range(CALLS):
        started_s = time.perf_counter()
        steering.agree(step)
        times_us.append(1e6 * (time.perf_counter() - started_s))
    return times_us


# ---- ranks alone ----------------------------------------------------------------------------------------------------


def forked_rows(scratch: Path, quiet: Path) -> Iterator[tuple[object, ...]]:
    for workers in (0, 2):
        for name in SIGNALS:
            for rank in (0, 1):
                yield forked_row(scratch, quiet, f"{name} twice to rank {rank}", workers, signal_to(rank, name))
        yield forked_row(scratch, quiet, "stop file", workers, lambda program: (program.said.parent / "run" / "stop").touch())
        yield forked_row(scratch, quiet, "run.stop_after=8s", workers, stopping.nothing, "run.stop_after=8s", ENDLESS)


def forked_row(scratch: Path, quiet: Path, name: str, workers: int, ask: object, *more: str) -> tuple[object, ...]:
    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        place, said, count = Path(directory) / "run", Path(directory) / "a.txt", f"data.workers={workers}"
        steps = 1 if more else 3
        outcome = asked_to_stop(place, ask, count, *more, said=said, steps=steps)  # type: ignore[arg-type]
        if more:  # it has no end: a few steps more show that it goes on
            asked_to_stop(place, lambda program: (place / "stop").touch(), count, ENDLESS, "run.stop_after=0", said=said)
        else:
            run("pretrain", "--run", place, *ARGUMENTS, count, said=said, world=2)
        is_equal = is_undisturbed(place, quiet) and (bool(more) or len(curve(place)) == STEPS)
    return (
        name,
        workers,
        outcome.codes,
        outcome.saved,
        outcome.steps_lost,
        len(outcome.alive),
        outcome.status.get("reason"),
        "equal" if is_equal else "DIFFERENT",
    )


# ---- the real launcher ----------------------------------------------------------------------------------------------


def launcher_rows(launcher: str, place: Path, quiet: Path) -> Iterator[tuple[object, ...]]:
    launchers = ("runner", "node launcher", "wrapper") if launcher == "deepspeed" else ("runner", "wrapper")
    for name in (*SIGNALS, "SIGKILL"):
        for whom in (*launchers, *(() if name == "SIGKILL" else ("rank 1", "rank 0"))):
            outcome, after_s = launched(launcher, place, name, whom, log=place.with_suffix(".txt"))
            reason = outcome.status.get("reason") or outcome.status
            yield name, whom, outcome.codes[0], f"{after_s:.1f}", outcome.saved, outcome.steps_lost, len(outcome.alive), reason
    is_equal = is_undisturbed(place, quiet)
    yield (
        "",
        "",
        "",
        "",
        newest_checkpoint(place),
        "",
        "",
        f"curve {'equal' if is_equal else 'DIFFERENT'} to the undisturbed one",
    )


def launched(launcher: str, place: Path, name: str, whom: str, *, log: Path) -> tuple[Outcome, float]:
    """One start of a launcher that is sent a signal; what became of it, and after how many seconds it had ended."""
    words = [str(SCRIPTS / launcher), *LAUNCHERS[launcher], str(free_port()), *(["--"] if launcher == "torchrun" else [])]
    command = [*words, "launch/pretrain.py", "--run", str(place), *ARGUMENTS, ENDLESS]
    if whom == "wrapper":
        command = [sys.executable, "launch/supervise.py", str(place), "--", *command]
    before = len(curve(place))
    with open(log, "w") as output:
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=output,
            stderr=output,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{SCRIPTS}:{os.environ['PATH']}"},
            start_new_session=True,
        )
    try:
        stopping.wait_for_steps(place, before + 3, Program(pids=[child.pid], said=log))
        processes = [process for process in [process_of(child.pid), *descendants(child.pid)] if process is not None]
        target = place_of(whom, child.pid, processes)
        os.kill(target, signal.Signals[name])
        sent_s = time.monotonic()
        code = child.wait(180)
        after_s = time.monotonic() - sent_s
        return outcome_of(place, [code], processes, alive_after_s=ALIVE_AFTER_S), after_s
    finally:
        if child.poll() is None:
            for process in [*descendants(child.pid), child]:
                os.kill(process.pid, signal.SIGKILL)
            child.wait()


def place_of(whom: str, started: int, processes: list[Process]) -> int:
    """The pid of a rank, a launcher or the wrapper among the processes of one start."""
    argv = {one.process.pid: one.argv for process in processes for one in ancestors(process.pid)}
    programs = {pid: program_of(words) for pid, words in argv.items()}
    if whom == "wrapper":
        return started
    if whom == "runner":
        return next(process.pid for process in processes if programs.get(process.pid) in LAUNCHERS)
    parents = ("deepspeed.launcher.launch", "torchrun", "accelerate")
    parent = next(process.pid for process in processes if programs.get(process.pid) in parents)
    if whom == "node launcher":
        return parent
    ranks = {rank_of(process.pid): process.pid for process in processes if ancestors(process.pid)[0].process.pid == parent}
    return ranks[int(whom.removeprefix("rank "))]


def rank_of(pid: int) -> int:
    words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(int(word.removeprefix(b"RANK=")) for word in words if word.startswith(b"RANK="))


if __name__ == "__main__":
    main()
