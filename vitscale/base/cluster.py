"""Who am I among the ranks: one answer from whichever launcher started the process.

launcher      what it sets
deepspeed     RANK LOCAL_RANK WORLD_SIZE LOCAL_SIZE MASTER_ADDR MASTER_PORT
torchrun,
accelerate    the same with LOCAL_WORLD_SIZE
srun          SLURM_PROCID SLURM_LOCALID SLURM_NTASKS SLURM_JOB_NODELIST: no address
mpirun        OMPI_COMM_WORLD_{RANK,LOCAL_RANK,SIZE,LOCAL_SIZE}: no address unless MASTER_ADDR is exported
none          nothing: a world of one

A complete RANK set wins over SLURM_*, because torchrun inside srun shows both.
"""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from vitscale.base.errors import UsageError

_COMPLETE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The place of this process among all processes of the run."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    master_addr: str
    master_port: int
    launcher: str
    host: str

    def threads(self) -> int:
        """Threads each rank may use: cores / local ranks. Fixed, because the number of threads changes the bits of a sum."""
        return max(1, len(os.sched_getaffinity(0)) // self.local_world)

    def environment(self) -> dict[str, str]:
        """The variables torch.distributed and DeepSpeed read; set before the process group is made."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_SIZE": str(self.local_world),
            "LOCAL_WORLD_SIZE": str(self.local_world),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }


def resolve_cluster(environ: Mapping[str, str]) -> Cluster:
    """Read rank, world and address from the environment of any supported launcher.

    Raises UsageError when a launcher's variables are there but incomplete, or are no numbers.
    """
    if all(name in environ for name in _COMPLETE):
        launcher = "deepspeed"
        if "TORCHELASTIC_RUN_ID" in environ:
            launcher = "accelerate" if any(name.startswith("ACCELERATE_") for name in environ) else "torchrun"
        return _build(
            launcher,
            rank=environ["RANK"],
            world=environ["WORLD_SIZE"],
            local_rank=environ["LOCAL_RANK"],
            local_world=environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE") or "1",
            master_addr=environ["MASTER_ADDR"],
            master_port=environ["MASTER_PORT"],
        )
    # A one-task srun step (or an interactive salloc shell) counts as a single process. So does the batch script itself,
    # which shows rank 0 and all tasks of the job although only srun would start them.
    is_batch_script = environ.get("ENVIRONMENT") == "BATCH" and "SLURM_STEP_NUM_TASKS" not in environ
    if "SLURM_PROCID" in environ and not is_batch_script and _number(environ, "SLURM_NTASKS", 1) > 1:
        nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or socket.gethostname()
        tasks_per_node = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or "1"
        port = 20000 + _number(environ, "SLURM_JOB_ID", 0) % 20000
        return _build(
            "srun",
            rank=environ["SLURM_PROCID"],
            world=environ["SLURM_NTASKS"],
            local_rank=environ.get("SLURM_LOCALID", "0"),
            local_world=re.split(r"[(,]", tasks_per_node)[0],
            master_addr=environ.get("MASTER_ADDR") or first_slurm_host(nodes),
            master_port=environ.get("MASTER_PORT", str(port)),
        )
    if _number(environ, "OMPI_COMM_WORLD_SIZE", 1) > 1:
        if "MASTER_ADDR" not in environ:
            raise UsageError(
                "mpirun gave ranks but no address; expected MASTER_ADDR in the environment: add `-x MASTER_ADDR=HOST_OF_RANK_0`"
            )
        return _build(
            "mpirun",
            rank=environ.get("OMPI_COMM_WORLD_RANK", ""),
            world=environ["OMPI_COMM_WORLD_SIZE"],
            local_rank=environ.get("OMPI_COMM_WORLD_LOCAL_RANK", ""),
            local_world=environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", ""),
            master_addr=environ["MASTER_ADDR"],
            master_port=environ.get("MASTER_PORT", "29500"),
        )
    partial = [name for name in ("RANK", "WORLD_SIZE") if name in environ]
    if _number(environ, "WORLD_SIZE", 1) > 1 or _number(environ, "RANK", 0) > 0:
        missing = [name for name in _COMPLETE if name not in environ]
        raise UsageError(f"the environment has {', '.join(partial)} but lacks {', '.join(missing)}; set all five or none")
    return Cluster(
        rank=0,
        world=1,
        local_rank=0,
        local_world=1,
        master_addr="127.0.0.1",
        master_port=_free_port(),
        launcher="none",
        host=socket.gethostname(),
    )


def first_slurm_host(nodes: str) -> str:
    """First host of a Slurm node list: `gpu[03-05,09],login1` gives `gpu03`."""
    head = re.match(r"([^\[,]+)(?:\[(\d+))?", nodes)
    if head is None:
        raise UsageError(f"expected a Slurm node list such as gpu[01-04], got {nodes!r}; export MASTER_ADDR instead")
    return head.group(1) + (head.group(2) or "")


def _build(launcher: str, *, master_addr: str, **texts: str) -> Cluster:
    numbers = {name: _whole(text, name, launcher) for name, text in texts.items()}
    if not numbers["rank"] < numbers["world"]:
        raise UsageError(f"rank {numbers['rank']} is outside a world of {numbers['world']}; check the launcher's variables")
    return Cluster(**numbers, master_addr=master_addr, launcher=launcher, host=socket.gethostname())


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    return _whole(environ[name], name, "the launcher") if name in environ else default


def _whole(text: str, name: str, launcher: str) -> int:
    if not text.isdecimal():
        raise UsageError(f"expected a whole number for {name} from {launcher}, got {text!r}")
    return int(text)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
