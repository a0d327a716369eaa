"""The gate before a run finds every known class of wrong gradient, names it, and does not alarm where all is well."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from launch.gate import _remember, _remembered, cache_directory, identity, twin_of
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


def lose_update(engine: Engine) -> None:
    """The optimizer runs, but at half the rate it was given."""
    engine.set_lr(0.5 * engine.zero_optimizer.param_groups[0]["lr"])


def keep_old_weight(engine: Engine) -> None:
    """Masters move, but one parameter of the model goes back to what it was."""
    honest, weight = engine.backward_and_maybe_step, dict(engine.module.named_parameters())[BLOCK]
    held = weight.ds_tensor if engine.ds.stage == 3 else weight
    old = held.detach().clone()

    def spoiled(loss: torch.Tensor, *rest: Callable[[str], None]) -> None:
        honest(loss, *rest)
        held.data.copy_(old)

    engine.backward_and_maybe_step = spoiled  # type: ignore[method-assign]


def spoil_updates(cluster: Cluster) -> list[tuple[int, str | None, str | None]]:
    found = []
    for stage in (1, 2, 3):
        config, ds = settings(cluster.world, "train.precision=bf16", zero_optimization={"stage": stage})
        # At stage 1 weights and masters are of one type, and a stage lower of one memory.
        found.append((stage, check(config, ds, lose_update).fault, check(config, ds, keep_old_weight).fault))
    return found


@pytest.mark.slow
def test_a_lost_update_and_an_old_weight_are_found_though_gradients_are_right():
    for stage, update, old in run_ranks(2, spoil_updates)[0]:
        assert update is not None and "differs by 50 % from the same optimizer in plain torch" in update, (stage, update)
        assert old is not None and f"numbers of {BLOCK} that the next forward pass would use are not the" in old, (stage, old)


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
    arguments = [
        *SMALL,
        "run.parity=first",
        "train.length=4",
        "run.eval_every=0",
        "run.save_every=0",
        "ds.zero_optimization.stage=1",
    ]
    said = run("pretrain", "--run", tmp_path / "a", *arguments, said=tmp_path / "a.txt", world=2)
    assert "gradients of 2 blocks with ZeRO stage 1" in said and "proven before" not in said
    assert len(list(cache_directory().glob("*.json"))) == 1
    said = run("pretrain", "--run", tmp_path / "b", *arguments, "optim.clip=0.5", said=tmp_path / "b.txt", world=2)
    assert "proven before" in said

    (tmp_path / "a" / "FINISHED.json").unlink()
    changed = "ds.vitscale.recompute=selective"
    said = run("pretrain", "--run", tmp_path / "a", *arguments, changed, said=tmp_path / "a2.txt", world=2)
    assert "continuing after step 4" in said and "proven before" not in said, "a resume may be a new configuration"
    assert "recomputing what is cheap" in said

    said = run("pretrain", "--run", tmp_path / "c", *arguments, "run.parity=never", said=tmp_path / "c.txt", world=2)
    assert "gradients of" not in said
    names = ("loss", "grad_norm", "samples_hash")
    assert curve(tmp_path / "a", *names) == curve(tmp_path / "c", *names)


@pytest.mark.slow
def test_wrong_gradients_end_the_program_with_3_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    honest = Engine.backward_and_maybe_step
    monkeypatch.setattr(Engine, "backward_and_maybe_step", lambda engine, loss, *rest: honest(engine, loss * 2, *rest))
    for arguments in (["--run", tmp_path / "run"], ["--check"]):
        said = run("pretrain", *arguments, *SMALL, "run.parity=first", said=tmp_path / "said.txt", code=3)
        (sentence,) = [line for line in said.splitlines() if line.startswith("error: ")]
        assert "differs by 100 % from plain torch" in sentence and "with ZeRO stage 2, fp32" in sentence
        assert "Traceback" not in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists() and not (tmp_path / "run" / "checkpoints").exists()
    assert not cache_directory().exists(), "a fault is not remembered"


def test_a_damaged_or_foreign_proof_is_none_and_a_cache_that_cannot_be_written_stops_nothing(tmp_path, capsys):
    proof = {"identity": "a", "sentence": "right"}
    run, path = tmp_path / "run", tmp_path / "cache" / "a.json"
    run.mkdir()
    assert _remembered(path, run, "a") is None
    _remember(proof, path=path, run=run)
    assert _remembered(path, run, "a") == proof and _remembered(path, run, "b") is None
    (run / "choices.json").unlink()
    assert _remembered(path, run, "a") == proof, "another run finds it in the cache"
    path.write_text('{"identity": "a", "sen')
    assert _remembered(path, run, "a") is None

    (tmp_path / "file").write_text("in the way")
    blocked = tmp_path / "file" / "a.json"
    assert capsys.readouterr().out == ""
    _remember(proof, path=blocked, run=run)
    assert "set XDG_CACHE_HOME" in capsys.readouterr().out
    assert _remembered(blocked, run, "a") == proof, "the run keeps it all the same"


COMPILED = """
import sys
from pathlib import Path
import torch
from torch import nn
from launch.engines import make_engine, silent
from launch.gate import prove_gradients
from tests.helpers.parity import CPU, settings
from tests.helpers.ranks import cluster_of, free_port
from vitscale.training.engine import start_ranks

shapes, symbols = [], []
def recorder(graph, inputs):
    shapes.append([tuple(value.shape) for value in inputs if isinstance(value, torch.Tensor) and value.ndim == 3])
    symbols.extend(value for value in inputs if isinstance(value, torch.SymInt))
    return graph.forward
compile_ours = nn.Module.compile
nn.Module.compile = lambda self: compile_ours(self, backend=recorder)
device = start_ranks(cluster_of(0, 1, free_port()))
overrides = ("optim.micro_batch_max=16", "optim.global_batch=32")
config, ds = settings(1, *overrides, zero_optimization={"stage": 1}, vitscale={"compile": "blocks"})
torch.manual_seed(5)
before = torch.get_rng_state()
prove_gradients(config, ds, run=Path(sys.argv[1]), device=device)
assert torch.equal(torch.get_rng_state(), before), "a global generator moved"
assert any(shape[0] == 4 for seen in shapes for shape in seen), "the twin was not compiled"
engine = make_engine(config, ds, initial=None, device=device, say=silent)
engine.train()
engine(torch.randn(16, 3, 8, 8))
assert shapes[-1][0][0] == 16 and not symbols, "compiled for any batch size"
"""


@pytest.mark.slow
def test_the_gate_leaves_no_compiled_code_and_no_generator_moved(tmp_path):
    """In a process of its own: having seen the twin's batch, torch would compile the run's blocks for any batch size."""
    root = Path(__file__).resolve().parents[3]
    ended = subprocess.run([sys.executable, "-c", COMPILED, tmp_path], cwd=root, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "gradients of 2 blocks with ZeRO stage 1, fp32, compiled blocks" in ended.stdout


@pytest.mark.slow
def test_check_compares_the_whole_model_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = run("pretrain", "--check", *SMALL, "model.depth=3", said=tmp_path / "a.txt", world=2)
    assert "gradients of 3 blocks" in said and said.count("%") >= 22 and "WRONG" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
