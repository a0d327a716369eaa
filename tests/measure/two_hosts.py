"""Two hosts under `deepspeed --hostfile` through every fault: what was said, how long it took, and whether the run went on.

    python -m tests.measure.two_hosts [--only WORD]

Needs root, ip, ssh, sshd and pdsh. After each fault the same command continues, over both hosts or on the first one alone, and
its curve is compared with that of a run that nothing disturbed.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.helpers.program import curve, run
from tests.multinode.stories import NAMES, RUN_ARGUMENTS, Story, cut_cable, killed_rank, plain, stopped_rank
from tests.multinode.two_hosts import TwoHosts, two_hosts, what_is_missing

RESHAPES = False
"""Whether a checkpoint of two ranks can be continued by one."""
FAULTS: dict[str, tuple[Callable[..., Story], tuple[int, ...]]] = {
    "SIGKILL of rank 1, then both hosts": (killed_rank, (1, 1)),
    "SIGSTOP of rank 1, then both hosts": (stopped_rank, (1, 1)),
    "cable cut, then host 1 with 2 ranks": (cut_cable, (2,)),
    **({"SIGKILL of rank 1, then host 1 with 1 rank": (killed_rank, (1,))} if RESHAPES else {}),
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
                    _tell(name, fault, slots, hosts, base / f"run{number}", curve(base / "quiet", *NAMES))
            if only in "wrong interface":
                hosts.write_environment_file(GLOO_SOCKET_IFNAME="eth7")
                story = plain(hosts, base / "wrong", said=base / "wrong.txt")
                _row("wrong interface", story, "")


def _tell(
    name: str, fault: Callable[..., Story], slots: Sequence[int], hosts: TwoHosts, directory: Path, expected: list[tuple]
) -> None:
    story = fault(hosts, directory, said=directory.with_suffix(".fault.txt"))
    again = plain(hosts, directory, said=directory.with_suffix(".again.txt"), slots=slots)
    seen = curve(directory, *NAMES)
    went_on = f"continued in {again.took_s:.0f} s, exit {again.exit_code}, curve "
    _row(name, story, went_on + ("equal bit by bit" if seen == expected else f"DIFFERS: {again.text[-2000:]}"))


def _row(name: str, story: Story, after: str) -> None:
    took = (
        f"deepspeed exit {story.exit_code} after {story.took_s:.0f} s; ranks gone {story.ended_after_s:.1f} s after the fault"
    )
    said = story.sentence or story.text[-2000:]
    print(
        f"{name}\n  {took}, {len(story.left_over)} left over\n  {said}\n  {after}",
        flush=True,
    )


if __name__ == "__main__":
    main()
