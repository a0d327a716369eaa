"""What ds_config.json asks DeepSpeed to print is printed, at every stage, and nothing else is."""

import logging
import os
import sys
from pathlib import Path

import pytest

from tests.helpers.ranks import run_ranks
from tests.measure.matrix import Cell, engine_of, loss_of, settings
from vitscale.base.cluster import Cluster
from vitscale.ds_config import resolve_ds_config
from vitscale.training.engine import deepspeed_logger

# Section: a text that only it prints.
INSTRUMENTS = {
    "flops_profiler": ({"enabled": True, "profile_step": 1, "detailed": False}, "DeepSpeed Flops Profiler"),
    "comms_logger": ({"enabled": True}, "Comm. Op            Message Size"),
    "wall_clock_breakdown": (True, "fwd_microstep:"),
    "steps_per_print": (1, "step=2, skipped=0"),
}
# At stage 2 each by itself, because one may raise the logger's level for another; elsewhere all of them together.
ALONE = {
    **INSTRUMENTS,
    "memory_breakdown": (True, "Engine before forward"),  # collects garbage at every mark, which takes seconds
    "dump_state": (True, "DeepSpeedEngine configuration"),
    "log_level": ("info", "distributed groups summary"),
}


def write_to(path: Path) -> None:
    """Let all that this process says go to a file; DeepSpeed's logger holds the stream of the time it was made."""
    sys.stdout.flush()
    output = os.open(path, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    for handler in deepspeed_logger.handlers:
        if isinstance(handler, logging.StreamHandler):  # pytest has added one of its own
            handler.setStream(sys.stdout)


def listen(cluster: Cluster, place: Path) -> None:
    """Train two steps for each line of what is asked, all that is said going to a file of its own."""
    for stage in (0, 1, 2, 3):
        asked = {"first": {}, "all": {name: value for name, (value, _) in INSTRUMENTS.items()}}
        if stage == 2:
            asked |= {name: {name: value} for name, (value, _) in ALONE.items()}
        for name, sections in {**asked, "last": {}}.items():
            config, _ = settings(Cell(1, stage, "fp32", "none", 1, "none"))
            ds = resolve_ds_config({"zero_optimization": {"stage": stage}, **sections}, config=config, world=1)
            write_to(place / f"{stage} {name}")
            engine = engine_of(config, ds)
            for step in range(2):
                engine.backward_and_maybe_step(loss_of(engine, config, step, slice(0, 24), engine.input_dtype))
            engine.close()
            sys.stdout.flush()


@pytest.mark.slow
def test_each_instrument_prints_at_every_stage_and_nothing_does_unasked(tmp_path):
    run_ranks(1, listen, tmp_path)
    for stage in (0, 1, 2, 3):
        for name in ("first", "last"):
            assert (tmp_path / f"{stage} {name}").read_text() == "", f"stage {stage}, {name}"
        for name, (_, mark) in INSTRUMENTS.items():
            assert mark in (tmp_path / f"{stage} all").read_text(), f"stage {stage}: {name} printed nothing"
    for name, (_, mark) in ALONE.items():
        assert mark in (tmp_path / f"2 {name}").read_text(), f"{name} printed nothing by itself"
