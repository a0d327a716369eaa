"""The gate before a run finds every known class of wrong gradient, names it, and does not alarm where all is well."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from launch.gate import cache_directory, identity, twin_of
from tests.helpers.parity import CPU, check, settings
from tests.helpers.program import SMALL, curve, run
from tests.helpers.ranks import run_ranks
from vitscale.base.cluster import Cluster
from vitscale.base.errors import EnvironmentFault
from vitscale.training.engine import Engine
from vitscale.training.parity import Verdict

BLOCK = "blocks.1.mlp.fc1.weight"


def weigh_losses(engine: Engine, weights: Callable[[int], float]) -> None:
    """Multiply the loss of micro-batch k by weights(k)."""
    honest, count = engine.backward_and_maybe_step, iter(range(1000))

    def spoiled(loss: torch.Tensor, *rest: Callable[[str], None]) -> None:
        honest(loss * weights(next(count) % engine.accumulation_steps), *rest)

    engine.backward_and_maybe_step = spoiled  # type: ignore[method-assign]


def weigh_gradients(engine: Engine, names: str, weight: float) -> None:
    for name, parameter in engine.module.named_parameters():
        if name.startswith(names):
            parameter.register_hook(lambda gradient: gradient * weight)


# Class of error: what it does to an engine, and a parameter that may be named as the worst (None: any).
ERRORS: dict[str, tuple[Callable[[Engine], None], str | None]] = {
    "last micro-batch lost (DeepSpeed issue 7985)": (lambda e: weigh_losses(e, lambda k: 0.0 if k == 1 else 1.0), None),
    "only the last micro-batch kept (open-instruct issue 1498)": (
        lambda e: weigh_losses(e, lambda k: 1.0 if k == 1 else 0.0),
        None,
    ),
    "gradients of a block zeroed (DeepSpeed issue 5590)": (lambda e: weigh_gradients(e, "blocks.1.", 0.0), "blocks.1."),
    "sum over the ranks for the mean": (lambda e: weigh_losses(e, lambda k: float(e.world)), None),
    "a rank left out of one reduction": (lambda e: weigh_gradients(e, BLOCK, 0.0 if e.rank else 1.0), BLOCK),
}
CELLS = [(0, "fp32"), (1, "bf16"), (2, "bf16"), (3, "fp32")]


def spoil_all(cluster: Cluster) -> dict[tuple[str, int], Verdict]:
    found = {}
    for stage, precision in CELLS:
        config, ds = settings(cluster.world, f"train.precision={precision}", zero_optimization={"stage": stage})
        found["nothing", stage] = check(config, ds)
        for name, (spoil, _) in ERRORS.items():
            found[name, stage] = check(config, ds, spoil)
    return found


@pytest.mark.slow
def test_five_known_errors_are_found_at_every_stage_and_the_parameter_named():
    verdicts = run_ranks(2, spoil_all)
    assert [(where, v.fault) for where, v in verdicts[0].items()] == [(where, v.fault) for where, v in verdicts[1].items()]
    for (name, stage), verdict in verdicts[0].items():
        print(f"{name}, stage {stage}: {verdict.whole.deviation:.2g}, allowed {verdict.whole.allowed:.2g}")
        if name == "nothing":
            assert verdict.fault is None, verdict.fault
            verdict.raise_fault()
            continue
        assert verdict.fault is not None, (name, stage)
        with pytest.raises(EnvironmentFault, match=r"the gradient of .* differs by .* from plain torch, allowed is"):
            verdict.raise_fault()
        worst = ERRORS[name][1]
        if worst is not None:
            assert verdict.gradients[0].name.startswith(worst), (name, stage, verdict.gradients[:3])
        assert verdict.gradients[0].deviation > 5 * verdict.gradients[0].allowed, (name, stage)  # far outside


HEALTHY: list[tuple[int, int, int, list[str], dict]] = [
    # ranks, stage, accumulation, overrides, sections of ds_config
    (1, 0, 1, [], {}),
    (1, 1, 4, ["train.precision=bf16"], {}),
    (1, 2, 2, ["model.norm=post"], {"vitscale": {"recompute": "all"}}),
    (1, 3, 2, ["train.precision=bf16", "model.norm=post"], {"vitscale": {"recompute": "selective"}}),
    (1, 2, 3, ["optim.optimizer=lion"], {}),
    (1, 0, 2, ["train.precision=bf16", "model.pool=map", "model.class_token=false"], {}),
    (1, 2, 2, ["train.precision=bf16", "model.layer_scale=1e-5", "model.activation=swiglu"], {}),
    (1, 3, 1, ["model.qk_norm=true", "model.parallel=true", "model.norm_kind=rmsnorm"], {}),
    (1, 1, 2, ["optim.layer_decay=0.7", "optim.head_weight_decay=3"], {}),
    (1, 2, 2, ["train.drop_path=0.3", "model.registers=2"], {"vitscale": {"recompute": 2}}),
    (2, 0, 2, ["train.precision=bf16"], {"vitscale": {"recompute": "all"}}),
    (2, 1, 1, ["model.norm=deepnorm"], {"vitscale": {"recompute": "selective"}}),
    (2, 2, 4, ["train.precision=bf16", "model.position=rotary"], {"vitscale": {"recompute": "all"}}),
    (2, 3, 4, ["train.precision=bf16"], {"vitscale": {"recompute": "all"}}),
    (2, 3, 2, ["optim.optimizer=muon"], {}),
    (2, 2, 2, ["optim.optimizer=sgd", "optim.moment_dtype=bf16"], {"zero_optimization": {"overlap_comm": True}}),
    (2, 2, 2, ["train.precision=bf16"], {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}),
    (2, 2, 2, ["train.precision=bf16"], {"data_types": {"grad_accum_dtype": "bf16"}}),
    (3, 2, 2, ["model.position=sincos2d_mae", "model.pool=average"], {"vitscale": {"recompute": "all"}}),
    (3, 3, 1, ["train.precision=bf16", "model.norm=respost"], {"vitscale": {"recompute": "selective"}}),
]


def check_cells(cluster: Cluster) -> list[str | None]:
    faults = []
    for ranks, stage, accumulation, overrides, sections in HEALTHY:
        if ranks != cluster.world:
            continue
        zero = {"zero_optimization": {"stage": stage} | sections.get("zero_optimization", {})}
        config, ds = settings(ranks, *overrides, accumulation=accumulation, **{**sections, **zero})
        faults.append(check(config, ds).fault)
    return faults


@pytest.mark.slow
def test_twenty_healthy_configurations_raise_no_alarm():
    assert len(HEALTHY) == 20
    faults = {(world, rank): found for world in (1, 2, 3) for rank, found in enumerate(run_ranks(world, check_cells))}
    assert {where: [fault for fault in found if fault] for where, found in faults.items()} == {where: [] for where in faults}


def test_the_twin_keeps_what_a_gradient_depends_on_and_its_identity_knows_it():
    config, ds = settings(2, "model.depth=7", "train.mixup=0.2", "train.ema=[0.9]", vitscale={"recompute": 5})
    twin, twin_ds = twin_of(config, ds)
    assert (twin.model.depth, twin_ds.accumulation, twin_ds.world, twin_ds.recompute) == (2, 2, 2, 2)
    assert replace(twin.model, depth=7) == config.model and twin.train.mixup == 0.2 and twin_ds.micro_batch % 4 == 0
    assert (twin.optim.clip, twin.train.ema) == (0.0, ())
    known = identity(twin, twin_ds, CPU)
    assert known == identity(*twin_of(*settings(2, "model.depth=7", "train.mixup=0.2", vitscale={"recompute": 5})), CPU)
    for override in ("model.width=64", "train.precision=bf16", "train.mixup=0.4", "optim.optimizer=lion"):
        assert identity(*twin_of(*settings(2, "train.mixup=0.2", override)), CPU) != known
    assert identity(*twin_of(*settings(2, "train.mixup=0.2", zero_optimization={"stage": 3})), CPU) != known


@pytest.mark.slow
def test_a_run_behind_the_gate_is_the_run_without_it_and_the_gate_remembers(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arguments = [*SMALL, "train.length=4", "run.eval_every=0", "run.save_every=0", "ds.zero_optimization.stage=1"]
    said = run("pretrain", "--run", tmp_path / "a", *arguments, said=tmp_path / "a.txt", world=2)
    assert "gradients of 2 blocks with ZeRO stage 1" in said and "proven before" not in said
    assert len(list(cache_directory().glob("*.json"))) == 1
    said = run("pretrain", "--run", tmp_path / "b", *arguments, "optim.clip=0.5", said=tmp_path / "b.txt", world=2)
    assert "proven before" in said
    said = run("pretrain", "--run", tmp_path / "c", *arguments, "run.parity=never", said=tmp_path / "c.txt", world=2)
    assert "gradients of" not in said
    names = ("loss", "grad_norm", "samples_hash")
    assert curve(tmp_path / "a", *names) == curve(tmp_path / "c", *names)


@pytest.mark.slow
def test_check_compares_the_whole_model_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = run("pretrain", "--check", *SMALL, "model.depth=3", said=tmp_path / "a.txt", world=2)
    assert "gradients of 3 blocks" in said and said.count("%") >= 22 and "WRONG" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
