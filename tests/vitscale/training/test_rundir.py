"""Whether a command may continue a run: what changes the result must be equal, the rest follows the command."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from tests.helpers.ranks import run_ranks
from vitscale.base.cluster import Cluster
from vitscale.base.errors import EnvironmentFault, UsageError
from vitscale.base.files import write_json
from vitscale.config import all_keys, apply_overrides, from_record, to_record
from vitscale.ds_config import resolve_ds_config
from vitscale.recipes.catalog import recipe_named
from vitscale.training import rundir
from vitscale.training.rundir import (
    Difference,
    begin_attempt,
    differences,
    leased,
    mark_finished,
    refuse_result_changes,
    require_shared_directory,
    stored_config,
)

STORED = apply_overrides(
    recipe_named("digits"), ["optim.peak_lr=0.002", "optim.warmup=5%", "optim.micro_batch_max=48", "run.log_every=1"]
)


def test_equal_configurations_do_not_differ():
    assert differences(STORED, from_record(to_record(STORED))) == []


def test_each_difference_has_its_kind_and_both_values_in_the_order_of_the_tree():
    wanted = apply_overrides(
        STORED, ["run.log_every=5", "data.workers=3", "optim.peak_lr=0.5", "model.pixel_mean=[1,2,3]", "optim.warmup=7"]
    )
    assert differences(STORED, dataclasses.replace(wanted, recipe="mine")) == [
        Difference(key="recipe", kind="watching", stored="digits", wanted="mine"),
        Difference(key="model.pixel_mean", kind="result", stored=[0.5, 0.5, 0.5], wanted=[1.0, 2.0, 3.0]),
        Difference(key="optim.peak_lr", kind="result", stored=0.002, wanted=0.5),
        Difference(key="optim.warmup", kind="result", stored="5%", wanted=7),
        Difference(key="data.workers", kind="machine", stored=0, wanted=3),
        Difference(key="run.log_every", kind="watching", stored=1, wanted=5),
    ]


def test_every_key_of_the_tree_is_compared(monkeypatch):
    record = to_record(STORED)
    unlike = {name: dict.fromkeys(v, "unlike") if isinstance(v, dict) else v for name, v in record.items()}
    monkeypatch.setattr(rundir, "to_record", {0: unlike, 1: record}.get)
    assert [d.key for d in differences(0, 1)] == all_keys()  # type: ignore[arg-type]


def test_a_changed_result_is_refused_with_both_values_of_every_key():
    wanted = apply_overrides(STORED, ["optim.peak_lr=0.5", "train.seed=3", "data.workers=3"])
    with pytest.raises(UsageError) as caught:
        refuse_result_changes(Path("runs/a"), differences(STORED, wanted))
    said = str(caught.value)
    assert "runs/a was started with another configuration" in said
    assert "optim.peak_lr is 0.002 in the run, 0.5 in the command; train.seed is 0 in the run, 3 in the command" in said
    assert "data.workers" not in said
    assert "another --run directory" in said


def test_machine_and_watching_keys_follow_the_command():
    wanted = apply_overrides(STORED, ["data.workers=3", "data.path=elsewhere", "run.log_every=5", "run.keep_last=9"])
    found = differences(STORED, wanted)
    assert [d.kind for d in found] == ["machine", "machine", "watching", "watching"]
    refuse_result_changes(Path("runs/a"), found)


def test_the_stored_configuration_is_read_strictly(tmp_path):
    assert stored_config(tmp_path) is None
    write_json(tmp_path / "config.json", to_record(STORED))
    assert stored_config(tmp_path) == STORED
    write_json(tmp_path / "config.json", to_record(STORED) | {"modl": 3})
    with pytest.raises(UsageError, match=rf"{tmp_path}/config.json: there is no setting 'modl'"):
        stored_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(EnvironmentFault, match=r"config.json cannot be read as JSON"):
        stored_config(tmp_path)


def two_attempts(cluster: Cluster, run: Path) -> None:
    require_shared_directory(run, cluster)
    followed = [Difference(key="data.workers", kind="machine", stored=0, wanted=3)]
    sys.argv = ["launch/pretrain.py", "--data", "s3://KEY:SE/CRET@bucket/set", "--token", "CRET"]
    for name in (".status.json.tmp-0123", "checkpoints/.latest.tmp-0123", "provenance/.attempt-001.json.tmp-0123"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("half")
    for differing in ([], followed):
        ds = resolve_ds_config({}, config=STORED, world=cluster.world)
        begin_attempt(run, config=STORED, ds=ds, cluster=cluster, followed=differing)


def test_each_start_leaves_a_record_and_the_resolved_settings(tmp_path):
    run = tmp_path / "runs" / "a"
    run_ranks(1, two_attempts, run)
    assert sorted(p.name for p in run.iterdir()) == [
        "checkpoints",
        "config.json",
        "ds_config.json",
        "provenance",
    ], "the nonce is gone, and what a kill had left half written"
    assert not list((run / "checkpoints").iterdir()) and len(list((run / "provenance").iterdir())) == 2
    assert stored_config(run) == STORED
    ds_record = json.loads((run / "ds_config.json").read_text())
    assert ds_record["train_micro_batch_size_per_gpu"] == 48
    first, second = (json.loads((run / f"provenance/attempt-00{n}.json").read_text()) for n in (1, 2))
    assert first["followed_the_command"] == []
    assert second["followed_the_command"] == [{"key": "data.workers", "kind": "machine", "stored": 0, "wanted": 3}]
    assert (first["world"], first["hosts"], first["launcher"]) == (1, ["test"], "test")
    assert first["versions"].keys() == {"python", "torch", "deepspeed"}
    assert first["threads"] >= 1
    assert first["command"] == ["launch/pretrain.py", "--data", "s3://***@bucket/set", "--token", "***"]
    assert not any("environ" in key for key in first), "the environment may hold secrets"


def sees_directory(cluster: Cluster, run: Path) -> str:
    """Rank 1 looks at another file system, as a host without the shared one would."""
    place = run if cluster.rank == 0 else run.with_name("not-mounted")
    try:
        require_shared_directory(place, dataclasses.replace(cluster, host=f"host{cluster.rank}"))
    except EnvironmentFault as error:
        return str(error)
    return "sees it"


@pytest.mark.slow
def test_a_host_that_does_not_see_the_run_directory_is_named_by_all(tmp_path):
    told = run_ranks(2, sees_directory, tmp_path / "run")
    assert told[0].startswith("hosts host1 do not see the run directory")
    assert told[1].startswith("host host1 does not see the run directory")


def leased_twice(cluster: Cluster, run: Path) -> list[str]:
    told = []
    with leased(run, cluster) as lease:
        told.append("holds it" if lease is not None and lease.is_mine() else "has none")
        try:
            with leased(run, cluster):
                told.append("twice")
        except EnvironmentFault as fault:
            told.append(str(fault))
    try:
        with leased(Path("/proc/nowhere"), cluster):
            told.append("on a file system that takes nothing")
    except EnvironmentFault as fault:
        told.append(str(fault))
    return told


@pytest.mark.slow
def test_a_run_has_one_owner_and_all_ranks_hear_who_it_is(tmp_path):
    first, second = run_ranks(2, leased_twice, tmp_path / "runs" / "a")
    assert first[0] == "holds it" and second[0] == "has none"
    assert first[1:] == second[1:]
    assert "is being trained by process" in first[1] and "/proc/nowhere cannot be written to" in first[2]


def test_the_finished_marker_is_the_record(tmp_path):
    mark_finished(tmp_path, {"step": 3})
    assert json.loads((tmp_path / "FINISHED.json").read_text()) == {"step": 3}
