"""Run our scripts as a user does, but forked from a process that has torch and deepspeed loaded: starts take no time."""

import importlib
from collections.abc import Sequence
from pathlib import Path

from launch import forked
from launch.forked import Program
from vitscale.training.metrics import read_lines

# Loaded before the fork.
SCRIPTS = {
    name: importlib.import_module(f"launch.{name}")
    for name in (
        "pretrain",
        "finetune",
        "evaluate",
        "export",
        "attention",
        "build_shards",
        "inspect_shards",
        "bench",
        "chaos",
    )
}


def start(
    script: str,
    *arguments: str | Path,
    said: Path,
    world: int = 1,
    env: dict[str, str] | None = None,
    cores: int | None = None,
) -> Program:
    """Start launch/<script>.py with `world` ranks, each on its first `cores` cores if given; returns at once."""
    return forked.start(SCRIPTS[script].main, *arguments, said=said, world=world, env=env, cores=cores)


def run(
    script: str,
    *arguments: str | Path,
    said: Path,
    world: int = 1,
    env: dict[str, str] | None = None,
    cores: int | None = None,
    code: int = 0,
    timeout_s: float = 240.0,
) -> str:
    """Run a script to its end; all ranks must leave with `code`. Returns what was said."""
    program = start(script, *arguments, said=said, world=world, env=env, cores=cores)
    codes = program.wait(timeout_s)
    assert codes == [code] * world, f"exit codes {codes}, expected {code}:\n{program.text}"
    return program.text


def steps_of(run_directory: Path) -> list[dict]:
    """The step lines of metrics.jsonl, evaluations left out."""
    return [line for line in read_lines(run_directory / "metrics.jsonl") if "eval" not in line]


def curve(run_directory: Path, *names: str) -> list[tuple]:
    """The named values of every step line, in the order of the file."""
    return [tuple(line[name] for name in ("step", *names)) for line in steps_of(run_directory)]


SMALL: Sequence[str] = (
    "model.depth=2",
    "model.width=32",
    "model.heads=2",
    "train.length=24",
    "optim.micro_batch_max=16",
    "run.parity=never",
)
"""Overrides that make the digits recipe a matter of seconds. That gradients are proven first is a law of test_parity."""
