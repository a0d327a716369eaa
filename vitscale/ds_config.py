"""Read ds_config.json, resolve every "auto", refuse every contradiction, and hand DeepSpeed a complete dictionary.

One number, one home: the recipe owns what changes the result (global batch, clipping, precision, the largest
micro-batch), ds_config.json owns how the machine does it. DeepSpeed itself does not know "auto", ignores unknown
top-level keys, and has defaults that change results (gradient_clipping 1.0, bf16 accumulation); so everything is
resolved, checked and written out here, before a process group exists. Pure Python: imports neither torch nor DeepSpeed.
"""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitscale.base.errors import UsageError, nearest
from vitscale.config import Config
from vitscale.ds_check import OFFLOADS, check_record, check_stage, offloaded
from vitscale.ds_keys import ACTIVATION_KEYS
from vitscale.model.config import Recompute


@dataclass(frozen=True, kw_only=True)
class DsConfig:
    """The resolved settings of the machine: a typed view and the two dictionaries behind it."""

    engine: dict[str, Any]
    """Complete dictionary for deepspeed.initialize; holds no "auto"."""
    record: dict[str, Any]
    """What the file says with every "auto" resolved, as stored in RUN/ds_config.json; read again it gives the same."""
    stage: int
    """ZeRO stage 0..3."""
    world: int
    micro_batch: int
    """Images one rank feeds forward at once."""
    accumulation: int
    """Micro-batches per step and rank; world * micro_batch * accumulation = global batch."""
    recompute: Recompute
    """0: no block is recomputed in the backward pass; 1: every block; k: every k-th; selective: the cheap parts of all."""
    checkpoint_keys: tuple[str, ...]
    """What DeepSpeed's own checkpoint function is asked for; empty: torch's function recomputes."""
    attention: str
    """Kernel of attention: "torch" (its own choice), "measured", or a name of model/kernels.py."""
    compile_blocks: bool
    """Whether every block is compiled by torch.compile."""
    offload_optimizer: bool
    """Whether masters and optimizer state lie in host memory and are updated there."""
    offload_param: bool
    """Whether the parameters lie in host memory until a block needs them (stage 3)."""
    is_talkative: bool
    """Whether DeepSpeed is asked for something that it says through its logger."""
    mechanism: str
    """How the precision is reached, in words."""


def read_ds_config(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Read the file and apply `ds.PATH=value` overrides (already without the `ds.`). Raises UsageError."""
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(
            f"expected a DeepSpeed configuration at {path}, found none; name one with --deepspeed_config"
        ) from None
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(record, dict):
        raise UsageError(f"{path}: expected a JSON object with keys, got {type(record).__name__}")
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals or not dotted:
            raise UsageError(f"expected ds.PATH=value, got 'ds.{override}'")
        *sections, key = dotted.split(".")
        place = record
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise UsageError(f"ds.{dotted}: {section!r} is a value, not a section")
        try:
            place[key] = json.loads(text)
        except ValueError:
            place[key] = text
    return record


def resolve_ds_config(record: dict[str, Any], *, config: Config, world: int) -> DsConfig:
    """Turn what the file says into what DeepSpeed gets, for a world of `world` ranks.

    Raises UsageError for unknown and refused keys, contradictions with the recipe (both values named), and world sizes
    or micro-batches that do not divide (valid ones named).
    """
    record = copy.deepcopy(record)
    check_record(record)

    _agree(record, "train_batch_size", config.optim.global_batch, "optim.global_batch")
    _agree(record, "gradient_clipping", config.optim.clip, "optim.clip")
    micro, accumulation = _batches(record, config=config, world=world)

    zero = record.setdefault("zero_optimization", {})
    stage = zero.setdefault("stage", 2)
    if not isinstance(stage, int) or isinstance(stage, bool) or stage not in range(4):
        raise UsageError(f"zero_optimization.stage: expected 0, 1, 2 or 3, got {stage!r}")

    mechanism, precision = _precision(record, stage=stage, config=config)
    check_stage(record, stage=stage, world=world, precision=config.train.precision)
    recompute = _recompute(record, depth=config.model.depth)
    attention = _one_of(record, "attention", ATTENTION_VALUES)
    compile_blocks = _compile(record, stage=stage, recompute=recompute)
    record |= {
        "train_batch_size": config.optim.global_batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optim.clip,
        "bf16": {"enabled": config.train.precision == "bf16"},
        "fp16": {**record.get("fp16", {}), "enabled": config.train.precision == "fp16"},
    }
    engine = {key: copy.deepcopy(record[key]) for key in record if key not in ("vitscale", "activation_checkpointing")}
    engine |= {
        **precision,
        "checkpoint": {"tag_validation": "Fail"},
        # On by default, and synchronises the device at every micro-step.
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
        # The optimizer is ours, also where its state lies in host memory: it is element-wise, and runs there as well.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    for section in OFFLOADS:
        if not offloaded(record, section):
            engine["zero_optimization"].pop(section, None)
    if config.train.precision != "fp16":
        engine["fp16"] = {"enabled": False}
    if stage == 0:
        # The engine clips there itself, after its own check for non-finite gradients: DeepSpeed has none at stage 0.
        engine["gradient_clipping"] = 0.0
    return DsConfig(
        engine=engine,
        record=record,
        stage=stage,
        world=world,
        micro_batch=micro,
        accumulation=accumulation,
        recompute=recompute,
        checkpoint_keys=_checkpoint_keys(record, recompute=recompute, compile_blocks=compile_blocks),
        attention=attention,
        compile_blocks=compile_blocks,
        offload_optimizer=offloaded(record, "offload_optimizer"),
        offload_param=offloaded(record, "offload_param"),
        is_talkative=_is_talkative(record),
        mechanism=mechanism,
    )


def _agree(record: dict[str, Any], key: str, ours: float, name: str) -> None:
    """A literal in the file that repeats a number of the recipe must repeat it exactly."""
    value = record.get(key, "auto")
    if value != "auto" and value != ours:
        raise UsageError(
            f'ds_config says {key}={value!r} but the recipe says {name}={ours!r}; set {key} to "auto" or {name}={value!r}'
        )


def _batches(record: dict[str, Any], *, config: Config, world: int) -> tuple[int, int]:
    """Micro-batch and accumulation with world * micro * accumulation = global batch."""
    batch = config.optim.global_batch
    if batch % world:
        valid = [n for n in divisors(batch) if n <= max(8, 2 * world)]
        raise UsageError(
            f"optim.global_batch={batch} cannot be shared equally by {world} ranks; "
            f"valid numbers of ranks: {', '.join(map(str, valid))}, or change optim.global_batch to a multiple of {world}"
        )
    share = batch // world
    micro = record.get("train_micro_batch_size_per_gpu", "auto")
    accumulation = record.get("gradient_accumulation_steps", "auto")
    for key, value in (("train_micro_batch_size_per_gpu", micro), ("gradient_accumulation_steps", accumulation)):
        if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UsageError(f'ds_config: {key}: expected a whole number of at least 1 or "auto", got {value!r}')
        if value != "auto" and share % value:
            raise UsageError(
                f"{key}={value} does not divide the {share} images of one rank "
                f"(optim.global_batch={batch} / {world} ranks); valid values: {', '.join(map(str, divisors(share)))}"
            )
    if micro == "auto":
        micro = (
            share // accumulation
            if accumulation != "auto"
            else max(n for n in divisors(share) if n <= config.optim.micro_batch_max)
        )
    if accumulation == "auto":
        accumulation = share // micro
    if micro * accumulation != share:
        raise UsageError(
            f"train_micro_batch_size_per_gpu={micro} x gradient_accumulation_steps={accumulation} x {world} ranks = "
            f'{micro * accumulation * world}, but optim.global_batch={batch}; set one of the two to "auto"'
        )
    return micro, accumulation


def divisors(number: int) -> list[int]:
    """All divisors in rising order."""
    return [n for n in range(1, number + 1) if number % n == 0]


def _precision(record: dict[str, Any], *, stage: int, config: Config) -> tuple[str, dict[str, Any]]:
    """DeepSpeed's keys for train.precision (design.md 7), and the mechanism in words."""
    wanted = config.train.precision
    said = {name: record.get(name, {}).get("enabled", "auto") for name in ("bf16", "fp16")}
    accumulate = record.get("data_types", {}).get("grad_accum_dtype")
    if all(value is True for value in said.values()):
        raise UsageError(
            "ds_config says bf16.enabled=true and fp16.enabled=true, but a run has one precision; "
            f'set both to "auto" and train.precision (now {wanted}) to the one that is meant'
        )
    for name, value in said.items():
        if value != "auto" and not isinstance(value, bool):
            raise UsageError(f'ds_config: {name}.enabled: expected true, false or "auto", got {value!r}')
        if value not in ("auto", wanted == name):
            raise UsageError(
                f"ds_config says {name}.enabled={json.dumps(value)} but the recipe says train.precision={wanted}; "
                f'set {name}.enabled to "auto"'
            )
    if accumulate not in (None, "fp32", "bf16"):
        raise UsageError(f"ds_config: data_types.grad_accum_dtype: expected fp32 or bf16, got {accumulate!r}")
    if accumulate == "bf16" and (wanted != "bf16" or stage <= 1):
        raise UsageError(
            f"ds_config: data_types.grad_accum_dtype=bf16 has no effect with train.precision={wanted} at stage {stage}; "
            "delete the key"
        )
    # A grad_accum_dtype that only repeats fp32 must not reach DeepSpeed where gradients are fp32 anyway: with bf16 it
    # raises at stage 0 and writes checkpoints that cannot be exported at stage 1.
    off: dict[str, Any] = {"bf16": {"enabled": False}, "data_types": {}}
    if wanted == "fp32":
        return "fp32", off
    if wanted == "fp16":
        # A scaled fp16 sum over micro-batches would overflow before any of its terms does.
        accumulation = {"data_types": {"grad_accum_dtype": "fp32"}}
        return "fp16 weights and scaled losses, fp32 masters and accumulation", {**off, **accumulation}
    if stage <= 1:
        return "bf16 autocast on fp32 weights", {**off, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    if accumulate == "bf16":
        return "bf16 weights and accumulation, fp32 masters", {}
    # DeepSpeed's default accumulates in bf16: 6.3e-3 relative gradient error over 32 micro-batches against 1.3e-3.
    return "bf16 weights, fp32 masters and accumulation", {"data_types": {"grad_accum_dtype": "fp32"}}


def _recompute(record: dict[str, Any], *, depth: int) -> Recompute:
    section = record.setdefault("vitscale", {})
    value = section.setdefault("recompute", "none")
    if value == "none":
        return 0
    if value == "all":
        return 1
    if value == "selective":
        return "selective"
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= depth:
        return value
    raise UsageError(
        f'vitscale.recompute: expected "none", "all", "selective" or a number from 1 to model.depth={depth}, got {value!r}'
    )


def _checkpoint_keys(record: dict[str, Any], *, recompute: Recompute, compile_blocks: bool) -> tuple[str, ...]:
    """The keys of the section activation_checkpointing that are on, in the order of ACTIVATION_KEYS."""
    section = record.get("activation_checkpointing", {})
    wanted = tuple(name for name in ACTIVATION_KEYS if section.get(name))
    if wanted and (recompute in (0, "selective") or compile_blocks):
        raise UsageError(
            f"ds_config: activation_checkpointing.{wanted[0]} needs blocks that are recomputed whole and not compiled; "
            'set vitscale.recompute to "all" or a number and vitscale.compile to none, or delete the key'
        )
    return wanted


def _is_talkative(record: dict[str, Any]) -> bool:
    plain = ("wall_clock_breakdown", "memory_breakdown", "steps_per_print")
    sections = ("flops_profiler", "comms_logger")
    return any(record.get(key) for key in plain) or any(record.get(key, {}).get("enabled", False) for key in sections)


ATTENTION_VALUES = ("torch", "measured", "flash", "cudnn", "efficient", "math")


def _one_of(record: dict[str, Any], key: str, values: Sequence[str]) -> str:
    """vitscale.KEY, the first of the values where nothing is said."""
    value = record["vitscale"].setdefault(key, values[0])
    if value not in values:
        raise UsageError(f"vitscale.{key}: expected one of {', '.join(values)}, got {value!r}{nearest(str(value), values)}")
    return value


def _compile(record: dict[str, Any], *, stage: int, recompute: Recompute) -> bool:
    wanted = _one_of(record, "compile", ("none", "blocks")) == "blocks"
    if wanted and stage == 3:
        raise UsageError(
            "vitscale.compile=blocks is not offered at ZeRO stage 3, where compiled and recomputed blocks lost gradients "
            "(DeepSpeed issue 5590); set vitscale.compile to none or zero_optimization.stage to 0, 1 or 2"
        )
    if wanted and recompute == "selective":
        raise UsageError(
            "vitscale.recompute=selective has no effect inside compiled blocks, where the compiler decides by itself what is "
            "cheap to compute again; set vitscale.recompute to none, all or a number, or vitscale.compile to none"
        )
    return wanted
