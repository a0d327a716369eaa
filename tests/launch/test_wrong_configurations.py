"""Law 5, for what a training can be configured to: one sentence with what was expected, what came and what to change.

Each must end before a process group exists and before a weight is allocated.
"""

import pytest
import torch

import launch.command
from launch.pretrain import main
from tests.helpers.program import run
from vitscale.base.errors import ExitCode, UsageError

BF16 = "train.precision=bf16"
FP16 = "train.precision=fp16"
ZERO = "ds.zero_optimization"

# (arguments, what was expected or why it cannot be, what came, what to change)
WRONG = [
    # contradictions between ds_config.json and the recipe
    (["ds.train_batch_size=64"], "optim.global_batch=96", "train_batch_size=64", 'set train_batch_size to "auto"'),
    (["ds.gradient_clipping=0.5"], "optim.clip=1.0", "gradient_clipping=0.5", 'set gradient_clipping to "auto"'),
    (["ds.bf16.enabled=true"], "train.precision=fp32", "bf16.enabled=true", 'set bf16.enabled to "auto"'),
    (["ds.fp16.enabled=true"], "train.precision=fp32", "fp16.enabled=true", 'set fp16.enabled to "auto"'),
    (["ds.fp16.enabled=true", "ds.bf16.enabled=true"], "one precision", "bf16.enabled=true and fp16.enabled=true", "set both"),
    (["ds.optimizer.type=AdamW"], "belongs to the recipe", "'optimizer'", "set optim.*"),
    (["ds.scheduler.type=WarmupLR"], "belongs to the recipe", "'scheduler'", "set optim.peak_lr"),
    (["ds.tensorboard.enabled=true"], "one writer", "'tensorboard'", "RUN/tensorboard"),
    # unknown and removed keys
    (["ds.zero_optimisation.stage=1"], "there is no key", "'zero_optimisation'", "did you mean 'zero_optimization'"),
    ([f"{ZERO}.overlap_com=true"], "there is no key", "overlap_com'", "did you mean 'overlap_comm'"),
    ([f"{ZERO}.offload_optimizer.devise=cpu"], "there is no key", "offload_optimizer.devise'", "did you mean 'device'"),
    (["ds.elasticity.enabled=true"], "has removed it", "'elasticity'", "delete the key"),
    (["ds.amp.enabled=true"], "has removed it", "'amp'", "delete the key"),
    ([f"{ZERO}.mics_shard_size=4"], "has removed it", "mics_shard_size'", "delete the key"),
    # "auto" where nobody resolves it, values of the wrong kind
    ([f"{ZERO}.reduce_bucket_size=auto"], 'cannot be "auto"', "reduce_bucket_size", "only these can: train_batch_size"),
    (["ds.steps_per_print=auto"], 'cannot be "auto"', "steps_per_print", "only these can"),
    ([f"{ZERO}.overlap_comm=yes"], "expected true or false", "got 'yes'", "overlap_comm"),
    ([f"{ZERO}.reduce_bucket_size=-1"], "expected a whole number of at least 1", "got -1", "reduce_bucket_size"),
    ([f"{ZERO}.stage=4"], "expected 0, 1, 2 or 3", "got 4", "zero_optimization.stage"),
    ([f'{ZERO}.stage="2"'], "expected 0, 1, 2 or 3", "got '2'", "zero_optimization.stage"),
    (["ds.communication_data_type=fp8"], "expected fp32, bf16, fp16 or null", "got 'fp8'", "did you mean"),
    (["ds.fp16.loss_scale_window=0"], "expected a whole number of at least 1", "got 0", "fp16.loss_scale_window"),
    # worlds and batches that do not divide
    (["--world", "5"], "optim.global_batch=96", "5 ranks", "valid numbers of ranks: 1, 2, 3, 4, 6, 8"),
    (["ds.train_micro_batch_size_per_gpu=7"], "96 images of one rank", "=7", "valid values: 1, 2, 3, 4, 6, 8"),
    (
        ["ds.train_micro_batch_size_per_gpu=8", "ds.gradient_accumulation_steps=2"],
        "optim.global_batch=96",
        "8 x gradient_accumulation_steps=2 x 1 ranks = 16",
        'set one of the two to "auto"',
    ),
    # what DeepSpeed cannot do at a stage, or not at all
    ([f"{ZERO}.stage=0", f"{ZERO}.offload_optimizer.device=cpu"], "no effect", "at stage 0", "stage to 1, 2 or 3"),
    ([f"{ZERO}.stage=2", f"{ZERO}.offload_param.device=cpu"], "no effect", "at stage 2", "stage to 3"),
    ([f"{ZERO}.offload_optimizer.device=nvme"], "expected none or cpu", "got 'nvme'", "set the device to cpu"),
    ([FP16, f"{ZERO}.stage=0"], "not offered at ZeRO stage 0", "train.precision=fp16", "stage to 1, 2 or 3"),
    (["ds.data_types.grad_accum_dtype=bf16", BF16, f"{ZERO}.stage=1"], "no effect", "at stage 1", "delete the key"),
    ([f"{ZERO}.stage=3", "ds.vitscale.compile=blocks"], "not offered at ZeRO stage 3", "compile=blocks", "compile to none"),
    (
        ["ds.vitscale.compile=blocks", "ds.vitscale.recompute=selective"],
        "no effect inside compiled blocks",
        "recompute=selective",
        "set vitscale.recompute to none, all or a number",
    ),
    (
        ["ds.vitscale.recompute=none", "ds.activation_checkpointing.cpu_checkpointing=true"],
        "needs blocks that are recomputed whole",
        "cpu_checkpointing",
        'set vitscale.recompute to "all"',
    ),
    (
        ["ds.activation_checkpointing.partition_activations=true"],
        "no effect",
        "partition_activations=True",
        "vitscale.recompute",
    ),
    (["ds.vitscale.recompute=99"], "expected", "got 99", "a number from 1 to model.depth"),
    ([f"{ZERO}.stage=3", f"{ZERO}.zero_hpz_partition_size=2"], "a number of ranks it divides", "1 ranks", "set it to 1"),
    (["ds.prescale_gradients=true"], "do not go with reduce_scatter", "at stage 2", "reduce_scatter to false"),
    # the recipe with itself
    pytest.param(["optim.warmup=200000"], "longer than the run", "200000", "shorten optim.warmup", marks=pytest.mark.slow),
    (["optim.cooldown=10"], "no effect with optim.schedule=cosine", "optim.cooldown=10", "optim.schedule to rsqrt or wsd"),
    (["optim.optimizer=lamb"], "no rank of ZeRO holds", "optim.optimizer=lamb is not offered", "take adamw"),
    (["optim.optimizer=adafactor"], "flat partitions do not know", "optim.optimizer=adafactor is not offered", "take adamw"),
    (["optim.optimizer=adamq"], "expected one of 'adamw', 'lion', 'sgd', 'muon'", "got 'adamq'", "optim.optimizer"),
    (["optim.moment_dtype=fp8"], "expected one of 'fp32', 'bf16'", "got 'fp8'", "optim.moment_dtype"),
    (["train.mix_group=1"], "at least 2", "got 1", "train.mix_group"),
    (["train.ema=[1.0]"], "within (0, 1)", "got 1.0", "train.ema"),
    (["train.precision=fp8"], "expected one of 'fp32', 'bf16', 'fp16'", "got 'fp8'", "train.precision"),
]


@pytest.mark.parametrize(("arguments", "expected", "got", "change"), WRONG, ids=lambda value: str(value)[:50])
def test_a_wrong_configuration_is_one_clear_sentence(tmp_path, monkeypatch, arguments, expected, got, change):
    def reached(*_: object, **__: object) -> None:
        raise AssertionError("weights would have been allocated")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch.command, "carry_out", reached)
    monkeypatch.setattr(torch.nn.Parameter, "__new__", reached)
    dry = ["--dry-run"] if "--world" in arguments else []
    monkeypatch.setattr("sys.argv", ["pretrain.py", *dry, *arguments])
    with pytest.raises(UsageError) as caught:
        main()
    said = str(caught.value)
    assert caught.value.exit_code == ExitCode.USAGE == 2
    assert "\n" not in said
    for part in (expected, got, change):
        assert part in said


@pytest.mark.parametrize("arguments", [[f"{ZERO}.stage=0", f"{ZERO}.offload_optimizer.device=cpu"], ["optim.optimizer=lamb"]])
def test_the_program_ends_with_2_and_writes_nothing(tmp_path, monkeypatch, arguments):
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    said = run("pretrain", *arguments, said=tmp_path / "said.txt", code=2)
    assert said.startswith("error: ") and len(said.splitlines()) == 1
    assert list(place.iterdir()) == []
