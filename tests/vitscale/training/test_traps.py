"""What DeepSpeed 0.19.8 does that nobody would expect, and the test that fails when it reaches us.

trap                                                       test
removed keys raise, unknown ones are ignored               test_ds_config: each_refused_key..., an_unknown_key..., our_tables...
"auto" is kept as a string or dropped                      test_ds_config: auto_is_refused..., deepspeed_accepts_what_it_gets
wrong types end in a traceback of pydantic                 test_ds_config: every_value_is_checked_before_deepspeed_sees_it
clipping at 1.0 where the key is absent                    no_clipping_means_none (here)
bf16 gradients add up in bf16                              gradients_add_up_in_fp32 (here)
stage 1 + bf16 + fp32 accumulation: BF16_Optimizer,        no_stage_gets_an_optimizer_whose_files_cannot_be_read (here);
  whose files zero_to_fp32 refuses                           test_engine: every_stage_trains_like_bare_torch... reads them
throughput timers wait for the device                      test_ds_config: dangerous_default_is_always_written
activation_checkpointing is read by nobody                 each_activation_setting... (here), test_ds_config: ...key_by_key
the process group's timeout does not reach ZeRO's groups   the_timeout_reaches_every_group (here)
buffers stay fp32 where parameters become bf16             computed_positions_train_in_bf16 (here)
no check for non-finite gradients at stage 0               test_engine: a_nan_on_one_rank_is_skipped_by_all...
skipped steps count as steps                               test_engine (as above), test_fp16, test_trainer: a_skipped_step...
gradients through engine.module are wrong at stage 3       nobody_calls_the_module_behind_the_engine (here)
`latest` is no mark of a whole checkpoint                  nobody_reads_latest (here), test_checkpoint: a_kill_during...
no check of a file's bytes                                 test_checkpoint: each_damage_is_seen...
one step counter for several groups at stage 3             counters_advance_once_per_step (here)
parameters of no elements break stages 1 to 3              no_parameter_is_empty (here)
autocast of one engine gives the next a gradient scaler    autocast_ends_with_its_engine (here)
an engine of stage 3 is kept for ever                      test_matrix: a_closed_engine_is_gone_at_every_stage
a C++ compiler is needed at the first start                the_operator_that_needs_a_compiler_is_off (here)
norms: None at stage 0, scaled under fp16                  test_matrix, test_fp16
"""

import ast
import datetime
from pathlib import Path
from typing import Any

import deepspeed.ops
import pytest
import torch
from deepspeed.utils import safe_get_full_grad

from tests.helpers.ranks import run_ranks
from tests.measure.matrix import CPU, Cell, engine_of, images_and_labels, loss_of, settings
from tests.vitscale.planning.test_activations import left_allocated
from vitscale.base.cluster import Cluster
from vitscale.config import apply_overrides
from vitscale.ds_config import resolve_ds_config
from vitscale.ds_keys import ACTIVATION_KEYS
from vitscale.model.config import ModelConfig
from vitscale.model.vit import VisionTransformer
from vitscale.training.checkpoint import TrainState, find_checkpoint, load_checkpoint
from vitscale.training.collectives import PROCESS_GROUP_TIMEOUT
from vitscale.training.engine import Engine, checkpoint_function, checkpointing
from vitscale.training.saving import save_checkpoint

ROOT = Path(__file__).resolve().parents[3]
STAGES = (0, 1, 2, 3)
POSITIONS = ("sincos2d_bv", "sincos2d_mae", "sinusoidal", "rotary")


def sources() -> list[tuple[Path, ast.Module]]:
    files = [path for package in ("vitscale", "launch") for path in sorted((ROOT / package).rglob("*.py"))]
    return [(path, ast.parse(path.read_text())) for path in files]


def test_nobody_calls_the_module_behind_the_engine():
    for path, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                assert node.func.attr != "module", f"{path}:{node.lineno} calls .module(...), not the engine"


def test_nobody_reads_latest():
    """Only training/saving.py names the file, to write it for DeepSpeed's tools."""
    naming = {
        path.name
        for path, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value == "latest"
    }
    assert naming == {"saving.py"}
    text = (ROOT / "vitscale/training/saving.py").read_text()
    assert text.count('"latest"') == text.count('write_bytes(checkpoints / "latest"') == 1


def test_no_parameter_is_empty():
    for more in ({}, {"registers": 0, "class_token": False, "pool": "average"}, {"position": "rotary"}, {"pool": "map"}):
        model = VisionTransformer(
            ModelConfig(**{"image_size": 8, "patch_size": 2, "width": 16, "depth": 1, "heads": 2, "classes": 3} | more)
        )
        assert all(parameter.numel() > 0 for parameter in model.parameters()), more


def gradient_of(engine: Engine, config: Any, *, micro_batches: int, dtype: torch.dtype) -> torch.Tensor:
    """The accumulated gradient of the head, read before the update; all below it is zero at the first step."""
    parameter = engine.module.head.weight
    taken = []
    step = engine._engine.step

    def look_and_step() -> None:
        if engine._engine.is_gradient_accumulation_boundary():
            taken.append(safe_get_full_grad(parameter).float().clone())
        step()

    engine._engine.step = look_and_step
    for k in range(micro_batches):
        engine.backward_and_maybe_step(loss_of(engine, config, 0, slice(k, k + 1), dtype))
    del engine._engine.step
    return taken[0]


def on_one_rank(cluster: Cluster, place: Path) -> dict[str, Any]:
    """What the laws below look at, gathered in one process."""
    seen: dict[str, Any] = {"compiler": deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"]}
    config, _ = settings(Cell(1, 0, "fp32", "none", 1, "none"))

    seen["clipping"], seen["wrapper"], seen["timeouts"] = {}, {}, set()
    for stage in STAGES:
        for precision in ("fp32", "bf16"):
            unclipped = apply_overrides(config, [f"train.precision={precision}", "optim.clip=0.0"])
            ds = resolve_ds_config({"zero_optimization": {"stage": stage}}, config=unclipped, world=1)
            engine = engine_of(unclipped, ds)
            seen["clipping"][stage, precision] = engine._engine.gradient_clipping()
            seen["wrapper"][stage, precision] = type(engine.zero_optimizer).__name__
            for group in (engine._engine.seq_data_parallel_group, engine._engine.data_parallel_group):
                seen["timeouts"].add(group._get_backend(CPU).options._timeout)
            # After a bf16 engine of stage 0 or 1 (autocast) each next engine must be free of it.
            if precision == "fp32" and stage > 0:
                seen.setdefault("scalers", []).append(engine.zero_optimizer.torch_autocast_gradscaler)
                seen.setdefault("buckets", []).append(list(engine.zero_optimizer.ipg_buckets))
            engine.close()

    gradients = {}
    ways = {"fp32": ("fp32", {}), "ours": ("bf16", {}), "coarse": ("bf16", {"grad_accum_dtype": "bf16"})}
    for name, (precision, accumulate) in ways.items():
        this = apply_overrides(config, [f"train.precision={precision}"])
        record = {"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 24, "data_types": accumulate}
        engine = engine_of(this, resolve_ds_config(record, config=this, world=1))
        gradients[name] = gradient_of(engine, this, micro_batches=24, dtype=engine.input_dtype)
        seen[f"accumulates {name}"] = str(engine.zero_optimizer.gradient_accumulation_dtype)
        engine.close()
    seen["gradients"] = {name: float((found - gradients["fp32"]).norm()) for name, found in gradients.items()}

    seen["positions"] = {}
    for position in POSITIONS:
        for stage in (2, 3):
            this = apply_overrides(config, [f"model.position={position}", "train.precision=bf16", "model.width=32"])
            engine = engine_of(this, resolve_ds_config({"zero_optimization": {"stage": stage}}, config=this, world=1))
            logits = engine(images_and_labels(0, slice(0, 8))[0].movedim(-1, 1).to(engine.input_dtype))
            engine.backward_and_maybe_step(logits.float().square().mean())
            seen["positions"][position, stage] = (str(logits.dtype), engine.last_step_skipped)
            engine.close()

    section = {"stage": 3, "sub_group_size": 1500}
    engine = engine_of(config, resolve_ds_config({"zero_optimization": section}, config=config, world=1))
    seen["counters"] = []
    for step in range(4):
        if step == 2:
            save_checkpoint(engine, place, state=TrainState(step=2), data={}, last=1)
            saved = find_checkpoint(place, say=print)
            assert saved is not None
            load_checkpoint(engine, saved)
        engine.backward_and_maybe_step(loss_of(engine, config, step, slice(0, 24), engine.input_dtype))
        states = [engine.optimizer_state(partition) for partition in engine.partitions]
        assert len(states) > 3  # sub-groups
        seen["counters"].append(sorted({float(state["step"]) for state in states}))
    engine.close()
    return seen


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    return run_ranks(1, on_one_rank, tmp_path_factory.mktemp("traps"))[0]


@pytest.mark.slow
def test_the_operator_that_needs_a_compiler_is_off(seen):
    assert seen["compiler"] is False


@pytest.mark.slow
def test_no_clipping_means_none(seen):
    assert set(seen["clipping"].values()) == {0.0}


@pytest.mark.slow
def test_no_stage_gets_an_optimizer_whose_files_cannot_be_read(seen):
    for (stage, precision), name in seen["wrapper"].items():
        if stage > 0:
            assert name == ("DeepSpeedZeroOptimizer_Stage3" if stage == 3 else "DeepSpeedZeroOptimizer"), (stage, precision)
        else:
            assert "FP16" not in name and "BF16" not in name, (stage, precision)


@pytest.mark.slow
def test_the_timeout_reaches_every_group(seen):
    assert seen["timeouts"] == {PROCESS_GROUP_TIMEOUT}
    assert datetime.timedelta(minutes=10) < PROCESS_GROUP_TIMEOUT  # what DeepSpeed and torch would take


@pytest.mark.slow
def test_autocast_ends_with_its_engine(seen):
    assert seen["scalers"] == [None] * 3
    assert seen["buckets"] == [[torch.float32]] * 3


@pytest.mark.slow
def test_gradients_add_up_in_fp32(seen):
    assert (seen["accumulates ours"], seen["accumulates coarse"]) == ("torch.float32", "torch.bfloat16")
    assert seen["gradients"]["ours"] < 0.8 * seen["gradients"]["coarse"], seen["gradients"]


@pytest.mark.slow
def test_computed_positions_train_in_bf16(seen):
    assert len(seen["positions"]) == 8
    assert set(seen["positions"].values()) == {("torch.bfloat16", False)}


@pytest.mark.slow
def test_counters_advance_once_per_step_also_after_a_load(seen):
    assert seen["counters"] == [[1.0], [2.0], [3.0], [4.0]]


# ---- activation_checkpointing and vitscale.recompute: bytes that the forward pass keeps for the backward pass --------


def kept_bytes(recompute: str | int, device: torch.device = CPU, **section: bool) -> int:
    """Bytes that the forward pass of 16 images leaves allocated, with the settings of ds_config.json as given."""
    config, _ = settings(Cell(1, 0, "fp32", "none", 1, "none"))
    config = apply_overrides(config, ["model.depth=4"])
    record = {"vitscale": {"recompute": recompute}, "activation_checkpointing": section}
    ds = resolve_ds_config(record, config=config, world=1)
    model = VisionTransformer(config.model, recompute=ds.recompute, checkpoint_function=checkpoint_function(ds, device)).train()
    return left_allocated(model, images_and_labels(0, slice(0, 16))[0].movedim(-1, 1).float())


def test_each_way_to_recompute_keeps_less_than_the_one_before():
    kept = [kept_bytes(recompute) for recompute in ("none", "selective", 2, "all")]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == 4, kept
    assert kept[3] < kept[0] / 4


def of_deepspeed(cluster: Cluster) -> dict[str, tuple[int, tuple[bool, bool, bool]]]:
    """Per setting: bytes kept, and what DeepSpeed's function was told to do (synchronise, profile, keep on the host)."""
    found = {"torch": (kept_bytes("all"), (False, False, False)), "none": (kept_bytes("none"), (False, False, False))}
    for key in ACTIVATION_KEYS:
        # On the host everything lies in host memory already: an accelerator is claimed, so that the key is not refused.
        device = torch.device("cuda") if key == "cpu_checkpointing" else CPU
        kept = kept_bytes("all", device, **{key: True})
        found[key] = (kept, (checkpointing.SYNCHRONIZE, checkpointing.PROFILE_TIME, checkpointing.CPU_CHECKPOINT))
    return found


@pytest.mark.slow
def test_each_activation_setting_takes_effect():
    found = run_ranks(1, of_deepspeed)[0]
    flags = {key: told for key, (_, told) in found.items()}
    assert flags["synchronize_checkpoint_boundary"] == (True, False, False)
    assert flags["profile"] == (False, True, False)
    assert flags["cpu_checkpointing"] == (False, False, True)
    for key in ACTIVATION_KEYS:  # each makes DeepSpeed's function run the blocks
        assert found[key][0] < found["none"][0] / 3, found
        assert found[key][0] != found["torch"][0], f"{key}: torch's function ran, as without the key: {found}"
