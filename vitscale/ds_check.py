"""What ds_config.json may hold at all: known keys, values of the right kind, and no two that exclude each other.

DeepSpeed would ignore some of these mistakes, answer others with a traceback of its own, and fail at others only once
the model is built. Here each is one sentence, before a process group exists. Raises UsageError throughout.
"""

import math
from collections.abc import Callable
from typing import Any

from vitscale.base.errors import UsageError, nearest
from vitscale.ds_keys import (
    ACTIVATION_KEYS,
    ACTIVATION_REASONS,
    AMOUNT,
    AUTO_KEYS,
    CHECKED_LATER,
    COUNT,
    COUNT_OR_NULL,
    DEPTH,
    DEVICE,
    FLAG,
    KNOWN,
    LEVEL_OR_NULL,
    NAMES,
    POSITIVE,
    REFUSED,
    SIZE,
    TEXT_OR_NULL,
    TYPE_OR_NULL,
    Table,
)

OFFLOADS = ("offload_optimizer", "offload_param")


def check_record(record: dict[str, Any]) -> None:
    """Every key is known and every value of its kind; "auto" stands only where it means something."""
    _check_section(record, KNOWN, "")
    for name, value in record.get("activation_checkpointing", {}).items():
        if name in ACTIVATION_KEYS and not isinstance(value, bool | None):
            raise UsageError(f"ds_config: activation_checkpointing.{name}: expected true or false, got {value!r}")
        if name in ACTIVATION_REASONS and value not in (False, None):
            raise UsageError(
                f"ds_config: activation_checkpointing.{name}={value!r} would have no effect: {ACTIVATION_REASONS[name]}; "
                'choose the recomputed blocks with vitscale.recompute ("none", "all", or a number k for every k-th)'
            )


def _check_section(section: dict[str, Any], table: Table, path: str) -> None:
    for name, value in section.items():
        dotted = f"{path}.{name}" if path else name
        if dotted in REFUSED:
            raise UsageError(f"ds_config: {dotted!r} is refused: {REFUSED[dotted]}")
        if name not in table:
            raise UsageError(f"ds_config: there is no key {dotted!r}{nearest(name, table)}")
        expected = table[name]
        if isinstance(expected, dict):
            if not isinstance(value, dict):
                raise UsageError(f"ds_config: expected a section with keys at {dotted!r}, got {value!r}")
            _check_section(value, expected, dotted)
        elif value == "auto" and dotted not in AUTO_KEYS:
            raise UsageError(f'ds_config: {dotted} cannot be "auto"; only these can: {", ".join(AUTO_KEYS)}')
        elif expected != CHECKED_LATER and not _FITS[expected](value):
            raise UsageError(f"ds_config: {dotted}: expected {expected}, got {value!r}{_about(value, expected)}")


def _about(value: Any, expected: str) -> str:
    """What to change, where the value tells what was meant."""
    if expected == DEVICE and value == "nvme":
        return "; offloading to nvme is not offered: it has not been tested here, set the device to cpu"
    if expected in (TYPE_OR_NULL, LEVEL_OR_NULL) and isinstance(value, str):
        return nearest(value, expected.replace(" or null", "").replace(" or ", ", ").split(", "))
    return ""


def _is_whole(value: Any, least: int) -> bool:
    return _is_number(value) and value == int(value) and value >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_FITS: dict[str, Callable[[Any], bool]] = {
    FLAG: lambda value: isinstance(value, bool),
    SIZE: lambda value: _is_whole(value, 0),
    COUNT: lambda value: _is_whole(value, 1),
    COUNT_OR_NULL: lambda value: value is None or _is_whole(value, 1),
    DEPTH: lambda value: _is_whole(value, -1),
    AMOUNT: lambda value: _is_number(value) and value >= 0,
    POSITIVE: lambda value: _is_number(value) and value > 0,
    TEXT_OR_NULL: lambda value: isinstance(value, str | None),
    NAMES: lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
    TYPE_OR_NULL: lambda value: value in (None, "fp32", "bf16", "fp16"),
    LEVEL_OR_NULL: lambda value: value in (None, "debug", "info", "warning", "error", "critical"),
    DEVICE: lambda value: value in ("none", "cpu"),
}


def offloaded(record: dict[str, Any], what: str) -> bool:
    """Whether zero_optimization.offload_optimizer or .offload_param names the host."""
    return record.get("zero_optimization", {}).get(what, {}).get("device", "none") == "cpu"


def check_stage(record: dict[str, Any], *, stage: int, world: int, precision: str) -> None:
    """Refuse what DeepSpeed cannot do at this ZeRO stage, or would not do without saying so."""
    if stage == 0 and offloaded(record, "offload_optimizer"):
        raise UsageError(
            "ds_config: zero_optimization.offload_optimizer.device=cpu would have no effect at stage 0, where the optimizer is "
            "not DeepSpeed's to move; set zero_optimization.stage to 1, 2 or 3, or the device to none"
        )
    if stage < 3 and offloaded(record, "offload_param"):
        raise UsageError(
            f"ds_config: zero_optimization.offload_param.device=cpu would have no effect at stage {stage}, where every rank "
            "keeps whole parameters; set zero_optimization.stage to 3, or the device to none"
        )
    if precision == "fp16" and stage == 0:
        raise UsageError(
            "train.precision=fp16 is not offered at ZeRO stage 0, where DeepSpeed leaves the gradients scaled and overflows "
            "unseen; set zero_optimization.stage to 1, 2 or 3, or train.precision to bf16"
        )
    zero = record.get("zero_optimization", {})
    prescaled = record.get("prescale_gradients", False) or record.get("gradient_predivide_factor", 1.0) != 1.0
    if prescaled and stage >= 2 and zero.get("reduce_scatter", True):
        raise UsageError(
            f"ds_config: prescale_gradients and gradient_predivide_factor do not go with reduce_scatter at stage {stage}; "
            "delete them or set zero_optimization.reduce_scatter to false"
        )
    if record.get("communication_data_type") is not None and precision == "bf16" and stage == 1:
        raise UsageError(
            f"ds_config: communication_data_type={record['communication_data_type']} would have no effect with "
            "train.precision=bf16 at stage 1, where autocast decides it; delete the key or set zero_optimization.stage to 2"
        )
    group = zero.get("zero_hpz_partition_size", 1)
    if group > 1 and (stage < 3 or world % group):
        raise UsageError(
            f"ds_config: zero_optimization.zero_hpz_partition_size={group} needs stage 3 and a number of ranks it divides, "
            f"got stage {stage} and {world} ranks; set it to 1 or to the ranks of one node"
        )
