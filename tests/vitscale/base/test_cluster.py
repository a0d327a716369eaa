"""One answer to "who am I" from every launcher, and a sentence where its variables make no sense."""

import os
import socket

import pytest

from vitscale.base.cluster import Cluster, first_slurm_host, resolve_cluster
from vitscale.base.errors import UsageError

FULL = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "n0", "MASTER_PORT": "29511"}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_JOB_ID": "41234567",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}
MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
# What sbatch shows the script itself: rank 0 of all tasks, though only srun would start them.
BATCH_SCRIPT = {
    "ENVIRONMENT": "BATCH",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "8",
    "SLURM_JOB_ID": "41234567",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_TASKS_PER_NODE": "4(x2)",
}
SRUN_PORT = 20000 + 41234567 % 20000


@pytest.mark.parametrize(
    ("environ", "launcher", "place", "address"),
    [
        pytest.param(FULL | {"LOCAL_SIZE": "4"}, "deepspeed", (5, 8, 1, 4), ("n0", 29511), id="deepspeed"),
        pytest.param(
            FULL | {"LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x"},
            "torchrun",
            (5, 8, 1, 4),
            ("n0", 29511),
            id="torchrun",
        ),
        pytest.param(
            FULL | {"LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x", "ACCELERATE_MIXED_PRECISION": "no"},
            "accelerate",
            (5, 8, 1, 4),
            ("n0", 29511),
            id="accelerate",
        ),
        pytest.param(SRUN, "srun", (5, 8, 1, 4), ("gpu07", SRUN_PORT), id="srun"),
        pytest.param(
            SRUN | {"SLURM_STEP_NODELIST": "gpu09"}, "srun", (5, 8, 1, 4), ("gpu09", SRUN_PORT), id="srun-step-on-some-nodes"
        ),
        pytest.param(
            SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"},
            "srun",
            (5, 8, 1, 4),
            ("10.0.0.1", 1234),
            id="srun-with-an-exported-address",
        ),
        pytest.param(
            {k: v for k, v in SRUN.items() if "STEP" not in k} | {"SLURM_TASKS_PER_NODE": "4,4"},
            "srun",
            (5, 8, 1, 4),
            ("gpu07", SRUN_PORT),
            id="srun-without-step-variables",
        ),
        pytest.param(BATCH_SCRIPT | SRUN, "srun", (5, 8, 1, 4), ("gpu07", SRUN_PORT), id="srun-in-a-batch-script"),
        pytest.param(
            BATCH_SCRIPT | FULL | {"LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x"},
            "torchrun",
            (5, 8, 1, 4),
            ("n0", 29511),
            id="torchrun-in-a-batch-script",
        ),
        pytest.param(
            SRUN | {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"} | FULL | {"LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x"},
            "torchrun",
            (5, 8, 1, 4),
            ("n0", 29511),
            id="torchrun-inside-srun",
        ),
        pytest.param(MPI | {"MASTER_ADDR": "n0"}, "mpirun", (5, 8, 1, 4), ("n0", 29500), id="mpirun"),
        pytest.param(
            MPI | {"MASTER_ADDR": "n0", "MASTER_PORT": "77"}, "mpirun", (5, 8, 1, 4), ("n0", 77), id="mpirun-with-port"
        ),
        pytest.param({}, "none", (0, 1, 0, 1), ("127.0.0.1", None), id="none"),
        pytest.param({"RANK": "0", "WORLD_SIZE": "1"}, "none", (0, 1, 0, 1), ("127.0.0.1", None), id="half-a-world-of-one"),
        pytest.param(
            SRUN | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, "none", (0, 1, 0, 1), ("127.0.0.1", None), id="one-task-srun"
        ),
        pytest.param(BATCH_SCRIPT, "none", (0, 1, 0, 1), ("127.0.0.1", None), id="the-batch-script-itself"),
        pytest.param(MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, "none", (0, 1, 0, 1), ("127.0.0.1", None), id="mpirun-of-one"),
    ],
)
def test_every_launcher_gives_rank_world_and_address(environ, launcher, place, address):
    found = resolve_cluster(environ)
    assert found.launcher == launcher
    assert (found.rank, found.world, found.local_rank, found.local_world) == place
    assert found.master_addr == address[0]
    assert found.master_port == address[1] if address[1] else 1024 <= found.master_port < 65536
    assert found.host == socket.gethostname()


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        (MPI, "add `-x MASTER_ADDR=HOST_OF_RANK_0`"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "has RANK, WORLD_SIZE but lacks LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "1"}, "has RANK but lacks WORLD_SIZE, LOCAL_RANK"),
        ({"WORLD_SIZE": "2"}, "has WORLD_SIZE but lacks RANK, LOCAL_RANK"),
        (FULL | {"RANK": "8"}, "rank 8 is outside a world of 8"),
        (FULL | {"RANK": "-1"}, "expected a whole number for rank from deepspeed, got '-1'"),
        (FULL | {"WORLD_SIZE": "eight"}, "expected a whole number for world from deepspeed, got 'eight'"),
        (SRUN | {"SLURM_NTASKS": "8x"}, "expected a whole number for SLURM_NTASKS from the launcher, got '8x'"),
        (SRUN | {"SLURM_PROCID": ""}, "expected a whole number for rank from srun, got ''"),
        (SRUN | {"SLURM_JOB_NODELIST": "[1]"}, "export MASTER_ADDR instead"),
        ({"OMPI_COMM_WORLD_SIZE": "8", "MASTER_ADDR": "n0"}, "expected a whole number for rank from mpirun, got ''"),
    ],
)
def test_variables_that_make_no_sense_are_one_sentence(environ, said):
    with pytest.raises(UsageError, match=said.replace("(", r"\(")):
        resolve_cluster(environ)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[03-05,09],login1", "gpu03"),
        ("gpu[7]", "gpu7"),
        ("gpu-a1,gpu-a2", "gpu-a1"),
        ("one", "one"),
        ("rack1-n[001-100]", "rack1-n001"),
    ],
)
def test_the_first_host_of_a_slurm_list_keeps_its_zeros(nodes, first):
    assert first_slurm_host(nodes) == first


def cluster(local_world: int) -> Cluster:
    return Cluster(
        rank=5,
        world=8,
        local_rank=1,
        local_world=local_world,
        master_addr="n0",
        master_port=29511,
        launcher="deepspeed",
        host="h",
    )


def test_the_environment_it_writes_is_read_back_as_the_same_place():
    environment = cluster(4).environment()
    assert environment == FULL | {"LOCAL_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}
    again = resolve_cluster(environment)
    assert (again.rank, again.world, again.local_rank, again.local_world) == (5, 8, 1, 4)


@pytest.mark.parametrize(("local_world", "threads"), [(1, 12), (2, 6), (5, 2), (12, 1), (16, 1)])
def test_cores_are_shared_equally_and_everybody_has_one(monkeypatch, local_world, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    assert cluster(local_world).threads() == threads
