"""Two hosts under `deepspeed --hostfile` through every fault: what was said, how long it took, and whether the run went on.

    python -m tests.measure.two_hosts [--only WORD]

Needs root, ip, ssh, sshd and pdsh. After each fault the same command continues, over both hosts or on the first one alone, and
its curve is compared with that of a run that nothing disturbed: bit by bit, or on another number of ranks sample by sample with
losses within 1e-5.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.helpers.program import curve, run
from tests.multinode.stories import NAMES, RUN_ARGUMENTS, Story, cut_cable, killed_rank, plain, stopped_rank
from tests.multinode.two_hosts import TwoHosts, two_hosts, what_is_missing

LOSS_TOLERANCE = 1e-5
FAULTS: dict[str, tuple[Callable[..., Story], tuple[int, ...]]] = {
    "SIGKILL of rank 1, then both hosts": (killed_rank, (1, 1)),
    "SIGSTOP of rank 1, then both hosts": (stopped_rank, (1, 1)),
    "cable cut, then host 1 with 2 ranks": (cut_cable, (2,)),
    "SIGKILL of rank 1, then host 1 with 1 rank": (killed_rank, (1,)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="stories whose name holds this word")
    only = parser.parse_args().only
    if what_is_missing():
        sys.exit(f"two hosts need {what_is_missing()}")
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        run("pretrain", "--run", base / "quiet", *RUN_ARGUMENTS, said=base / "quiet.txt", world=2, cores=2)
        with two_hosts(base / "hosts") as hosts:
            for number, (name, (fault, slots)) in enumerate(FAULTS.items()):
                if only in name:
                    _tell(name, fault, slots, hosts, base / f"run{number}", base / "quiet")
            if only in "wrong interface":
                hosts.write_environment_file(GLOO_SOCKET_IFNAME="eth7")
                _row("wrong interface", plain(hosts, base / "wrong", said=base / "wrong.txt"), "")


def _tell(name: str, fault: Callable[..., Story], slots: Sequence[int], hosts: TwoHosts, directory: Path, quiet: Path) -> None:
    story = fault(hosts, directory, said=directory.with_suffix(".fault.txt"))
    again = plain(hosts, directory, said=directory.with_suffix(".again.txt"), slots=slots)
    same = _compared(directory, quiet, is_same_world=sum(slots) == 2)
    words = f"DIFFERENT curve: {again.text[-2000:]}" if same is None else same
    _row(name, story, f"continued in {again.took_s:.0f} s, exit {again.exit_code}, {words}")


def _compared(directory: Path, quiet: Path, *, is_same_world: bool) -> str | None:
    """In which sense the curves are equal; None: in none."""
    if curve(directory, *NAMES) == curve(quiet, *NAMES):
        return "curve equal bit by bit"
    if is_same_world or curve(directory, "samples_hash") != curve(quiet, "samples_hash"):
        return None
    pairs = zip(curve(directory, "loss"), curve(quiet, "loss"), strict=True)
    furthest = max(abs(loss / expected - 1) for (_, loss), (_, expected) in pairs)
    return f"same samples, losses within {furthest:.1e}" if furthest <= LOSS_TOLERANCE else None


def _row(name: str, story: Story, after: str) -> None:
    took = (
        f"deepspeed exit {story.exit_code} after {story.took_s:.0f} s; ranks gone {story.ended_after_s:.1f} s after the fault"
    )
    said = story.sentence or story.text[-2000:]
    print(f"{name}\n  {took}, {len(story.left_over)} left over\n  {said}\n  {after}", flush=True)


if __name__ == "__main__":
    main()
