"""A checkpoint continues on any number of ranks, at any ZeRO stage: every number arrives unchanged."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.program import SMALL, curve, run, start
from tests.helpers.ranks import run_ranks
from tests.helpers.small_engine import batch_of, make, settings
from vitscale.base.cluster import Cluster
from vitscale.base.errors import EnvironmentFault, UsageError
from vitscale.training.checkpoint import TrainState, find_checkpoint, load_checkpoint
from vitscale.training.collectives import from_all_ranks
from vitscale.training.engine import Engine
from vitscale.training.saving import save_checkpoint

pytestmark = pytest.mark.slow

ROAD = [(1, 1), (2, 3), (4, 2), (3, 0), (1, 3), (2, 1), (3, 2)]
"""(ranks, ZeRO stage) of each start."""
STEPS = 4
"""Of each start."""
RICH = ("train.ema=[0.9, 0.99]", "optim.layer_decay=0.7", "optim.head_weight_decay=0.3")


def whole_state(engine: Engine) -> dict[str, np.ndarray]:
    """Every number of weights, optimizer and averages by "what/parameter", put together from the live partitions."""
    pieces = []
    for partition in engine.partitions:
        state = engine.optimizer_state(partition)
        flats = {"weights": partition.master, **{key: value for key, value in state.items() if value.dim()}}
        flats |= {f"average {decay}": engine.averages.of(decay, partition.key) for decay in engine.averages.decays}
        for piece in partition.pieces:
            for what, flat in flats.items():
                part = flat.detach().float().reshape(-1)[piece.offset : piece.offset + piece.numel].clone().numpy()
                pieces.append((f"{what}/{piece.name}", np.prod(piece.shape), piece.start, part))
            pieces.append((f"step/{piece.name}", 1, 0, np.array([float(state.get("step", 0))], np.float32)))
    found: dict[str, np.ndarray] = {}
    for name, numel, start_, part in [piece for of_rank in from_all_ranks(pieces) for piece in of_rank]:
        found.setdefault(name, np.full(int(numel), np.nan, np.float32))[start_ : start_ + len(part)] = part
    assert not any(np.isnan(numbers).any() for numbers in found.values())
    return found


def train(engine: Engine, config, steps: range) -> list[float]:
    """Mean loss of each step over the global batch."""
    losses = []
    share = config.optim.global_batch // engine.world
    micro = share // engine.accumulation_steps
    for step in steps:
        engine.set_lr(1e-3 * (step + 1))
        pixels, labels = batch_of(step, config)
        total = 0.0
        for number in range(engine.accumulation_steps):
            begin = engine.rank * share + number * micro
            mine = slice(begin, begin + micro)
            logits = engine(pixels[mine].to(engine.input_dtype)).float()
            loss = torch.nn.functional.cross_entropy(logits, labels[mine])
            total += loss.item() / engine.accumulation_steps
            engine.backward_and_maybe_step(loss)
        losses.append(engine.sum_over_ranks([total])[0] / engine.world)
    return losses


def undisturbed(cluster: Cluster, more: tuple[str, ...]) -> list[float]:
    """Losses of one engine over all steps of the road."""
    config, ds = settings(1, cluster.world, *more)
    engine = make(config, ds)
    losses = train(engine, config, range(STEPS * len(ROAD)))
    engine.close()
    return losses


def one_start(cluster: Cluster, stage: int, place: Path, number: int, more: tuple[str, ...]) -> tuple:
    """Load what is there, train, save; (state after the load, losses, state before the save)."""
    config, ds = settings(stage, cluster.world, *more)
    engine = make(config, ds)
    saved = find_checkpoint(place, say=print)
    assert (saved is None) == (number == 0)
    if saved is not None:
        assert load_checkpoint(engine, saved) == TrainState(step=number * STEPS, position=7)
    loaded = whole_state(engine)
    losses = train(engine, config, range(number * STEPS, (number + 1) * STEPS))
    trained = whole_state(engine)
    save_checkpoint(engine, place, state=TrainState(step=(number + 1) * STEPS, position=7), data={}, last=2)
    engine.close()
    return loaded, losses, trained


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_number_arrives_on_other_ranks_and_stages(tmp_path, optimizer):
    more = (*RICH, f"optim.optimizer={optimizer}", *(["optim.moment_dtype=bf16"] if optimizer == "muon" else []))
    road = ROAD if optimizer == "adamw" else ROAD[1:4]
    starts = []
    for number, (world, stage) in enumerate(road):
        by_rank = run_ranks(world, one_start, stage, tmp_path / "road", number, more)
        assert all(losses == by_rank[0][1] for _, losses, _ in by_rank)
        starts.append(by_rank[0])
    for (_, _, trained), (loaded, _, _) in pairwise(starts):
        assert trained.keys() == loaded.keys() and len(loaded) > 50
        assert all((trained[name] == loaded[name]).all() for name in trained)
    if optimizer == "adamw":
        expected = run_ranks(1, undisturbed, more)[0]
        assert [loss for _, losses, _ in starts for loss in losses] == pytest.approx(expected, rel=1e-5)


def test_a_run_continues_on_any_world_and_stage_with_the_same_images(tmp_path):
    """1 -> 2 -> 4 -> 3 -> 1 ranks and ZeRO 1 -> 3 -> 2 -> 0 -> 2 by the same command: each killed after five steps."""
    arguments = [*SMALL, "run.save_every=5", "run.eval_every=0", "run.log_every=1", "train.ema=[0.9]"]
    run("pretrain", "--run", tmp_path / "quiet", *arguments, "ds.zero_optimization.stage=1", said=tmp_path / "quiet.txt")
    for number, (world, stage) in enumerate([(1, 1), (2, 3), (4, 2), (3, 0), (1, 2)]):
        env = {"VITSCALE_FAULT": f"kill@step.end:step={5 * number + 7}"}
        where = ("--run", tmp_path / "road", *arguments, f"ds.zero_optimization.stage={stage}", "data.workers=1")
        program = start("pretrain", *where, said=tmp_path / f"{number}.txt", world=world, env=env)
        codes = program.wait()
        assert codes == ([0] if number == 4 else [-9] * world), program.text
    exact = ("samples_hash", "images_seen", "lr")
    assert curve(tmp_path / "road", *exact) == curve(tmp_path / "quiet", *exact)
    losses, expected = ([loss for _, loss in curve(tmp_path / name, "loss")] for name in ("road", "quiet"))
    assert losses == pytest.approx(expected, rel=1e-5) and len(losses) == 24
    assert losses[:5] == expected[:5] and losses != expected  # the others were summed in another order


def mismatches(cluster: Cluster, place: Path) -> list[str]:
    """What is said when the state is another model's, or lacks averages."""
    config, ds = settings(2, 1)
    engine = make(config, ds)
    train(engine, config, range(1))
    save_checkpoint(engine, place, state=TrainState(step=1), data={}, last=1)
    engine.close()
    saved = find_checkpoint(place, say=print)
    assert saved is not None
    said = []
    for overrides, error in ((["model.width=32"], EnvironmentFault), (["train.ema=[0.9]"], UsageError)):
        config, ds = settings(2, 1, *overrides)
        engine = make(config, ds)
        with pytest.raises(error) as caught:
            load_checkpoint(engine, saved)
        said.append(str(caught.value))
        engine.close()
    return said


def test_another_model_and_other_averages_are_refused_by_name(tmp_path):
    other_model, averages = run_ranks(1, mismatches, tmp_path)[0]
    assert "holds the state of another model" in other_model and "is not in both, or of another shape" in other_model
    assert averages == "step-00000001 does not continue with this train.ema: it has none, the command 0.9"
