"""Moving averages follow the masters, wherever ZeRO keeps them; they are saved, restored, evaluated, and never in the way."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers.ranks import run_ranks
from tests.helpers.small_engine import batch_of, make, settings, train, whole_tensors
from vitscale.base.cluster import Cluster
from vitscale.base.errors import EnvironmentFault, UsageError
from vitscale.config import Config
from vitscale.model.vit import VisionTransformer
from vitscale.training import ema as ema_module
from vitscale.training.checkpoint import TrainState, find_checkpoint, load_checkpoint
from vitscale.training.ema import Averages
from vitscale.training.engine import Engine
from vitscale.training.partitions import consolidate
from vitscale.training.pieces import whole
from vitscale.training.saving import save_checkpoint

DECAYS = (0.9, 0.999)
EMA = f"train.ema={list(DECAYS)}"
STEPS, SKIPPED = 50, 7


# ---- by themselves -------------------------------------------------------------------------------------------------


def two_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"a": torch.randn(5, 3, generator=generator), "b": torch.randn(7, generator=generator)}


def test_an_average_starts_as_the_weights_and_closes_its_distance_by_one_minus_decay():
    masters = two_tensors()
    averages = Averages([whole(name, master) for name, master in masters.items()], DECAYS)
    expected = {decay: {name: master.double() for name, master in masters.items()} for decay in DECAYS}
    for _ in range(4):
        for name, master in masters.items():
            master.mul_(-1.5).add_(0.25)
            for decay in DECAYS:
                expected[decay][name] = decay * expected[decay][name] + (1 - decay) * master.double()
        averages.update()
    for decay in DECAYS:
        for name in masters:
            torch.testing.assert_close(
                averages.tensors()[f"{decay}/{name}"].double(), expected[decay][name], rtol=1e-6, atol=1e-6
            )


@pytest.mark.parametrize("chunk", [1 << 22, 4])
def test_swapping_exchanges_and_swapping_twice_is_nothing(chunk, monkeypatch):
    monkeypatch.setattr(ema_module, "CHUNK", chunk)
    masters = two_tensors()
    averages = Averages([whole(name, master) for name, master in masters.items()], DECAYS)
    for master in masters.values():
        master.mul_(3.0)
    averages.update()
    before = {name: master.clone() for name, master in masters.items()}
    kept = {name: average.clone() for name, average in averages.tensors().items()}
    averages.swap(0.9)
    assert all(torch.equal(masters[name], kept[f"0.9/{name}"]) for name in masters)
    averages.swap(0.9)
    assert all(torch.equal(masters[name], before[name]) for name in masters)
    assert all(torch.equal(average, kept[name]) for name, average in averages.tensors().items())


# ---- on ZeRO -------------------------------------------------------------------------------------------------------

CELLS = [(0, "fp32"), (1, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")]
MORE = range(STEPS, STEPS + 3)


def one_cell(cluster: Cluster, stage: int, precision: str, place: Path) -> dict:
    config, ds = settings(stage, cluster.world, EMA, f"train.precision={precision}", "optim.layer_decay=0.7")
    engine = make(config, ds)
    found = followed(engine, config)

    checkpoints = place / f"{stage}-{precision}"
    save_checkpoint(engine, checkpoints, state=TrainState(step=STEPS), data={}, last=1, every=0)
    masters = [partition.master.detach().clone() for partition in engine.partitions]
    averages = {name: average.clone() for name, average in engine.averages.tensors().items()}
    found["logits"] = [evaluated(engine, config, decay) for decay in DECAYS]
    now = engine.averages.tensors()
    found["restored"] = all(torch.equal(a, b.master) for a, b in zip(masters, engine.partitions, strict=True)) and all(
        torch.equal(average, now[name]) for name, average in averages.items()
    )
    onward = train(engine, config, MORE), {n: w.numpy() for n, w in averages_of(engine, DECAYS[1]).items()}
    engine.close()

    engine = make(config, ds)
    saved = find_checkpoint(checkpoints, say=print)
    assert saved is not None
    load_checkpoint(engine, saved)
    found["whole"] = all(
        torch.equal(w, consolidate(saved.directory, ema=decay)[name])
        for decay in DECAYS
        for name, w in averages_of(engine, decay).items()
    )
    resumed = train(engine, config, MORE), {n: w.numpy() for n, w in averages_of(engine, DECAYS[1]).items()}
    found["resumed"] = onward[0] == resumed[0] and all((onward[1][n] == resumed[1][n]).all() for n in onward[1])
    found["files"] = sorted(file.name for file in saved.directory.glob("ema-*"))
    engine.close()
    return found


def followed(engine: Engine, config: Config) -> dict:
    """Fifty steps, one of them skipped: worst difference to the recursion on gathered masters, and the bytes kept."""
    expected = {decay: whole_tensors(engine) for decay in DECAYS}

    def follow(step: int) -> None:
        assert engine.last_step_skipped == (step == SKIPPED)
        if engine.last_step_skipped:
            return
        for name, master in whole_tensors(engine).items():
            for decay in DECAYS:
                expected[decay][name].lerp_(master, 1 - decay)

    train(engine, config, range(STEPS), poison=SKIPPED, after=follow)
    differences = []
    for decay in DECAYS:
        averages = averages_of(engine, decay)
        differences += [(averages[name] - whole).abs().max().item() for name, whole in expected[decay].items()]
    return {
        "difference": max(differences),
        "moved": max((a - b).abs().max().item() for a, b in zip(expected[0.9].values(), expected[0.999].values(), strict=True)),
        "bytes": sum(average.numel() * average.element_size() for average in engine.averages.tensors().values()),
        "numbers": sum(whole.numel() for whole in expected[0.9].values()),
    }


def averages_of(engine: Engine, decay: float) -> dict[str, Tensor]:
    tensors = engine.averages.tensors()
    return whole_tensors(engine, lambda partition: tensors[f"{decay}/{partition.key}"])


def evaluated(engine: Engine, config: Config, decay: float) -> float:
    """Largest difference between the engine's logits under the averages and those of a plain model with them."""
    plain = VisionTransformer(config.model)
    plain.load_state_dict(averages_of(engine, decay))
    pixels, _ = batch_of(0, config)
    engine.eval()
    with torch.no_grad():
        with engine.averaged(decay):
            ours = engine(pixels.to(engine.input_dtype)).float()
        return (ours - plain(pixels)).abs().max().item()


def all_cells(cluster: Cluster, place: Path) -> dict:
    return {cell: one_cell(cluster, *cell, place) for cell in CELLS}


@pytest.mark.slow
def test_at_every_stage_averages_equal_the_recursion_on_gathered_masters_and_leave_no_trace(tmp_path):
    for rank, of_rank in enumerate(run_ranks(2, all_cells, tmp_path)):
        for (stage, precision), found in of_rank.items():
            where = f"rank {rank}, stage {stage}, {precision}: {found}"
            assert found["difference"] <= 1e-7 and found["moved"] > 0.01, where
            # 4 bytes for each decay and number; at stages 1 to 3 half of them, and the padding of two ranks' shares.
            share = found["numbers"] if stage == 0 else found["numbers"] / 2
            padding = 0 if stage == 0 else 4 if stage < 3 else 60
            assert 4 * len(DECAYS) * share <= found["bytes"] <= 4 * len(DECAYS) * (share + padding), where
            # Logits are of size 1; bfloat16 has 8 bits.
            assert max(found["logits"]) < (1e-5 if precision == "fp32" else 0.1), where
            assert found["restored"] and found["whole"] and found["resumed"], where
            assert found["files"] == [f"ema-{n:05d}.safetensors" for n in range(1 if stage == 0 else 2)], where


def saved_with_one_average(cluster: Cluster, place: Path) -> list[str]:
    config, ds = settings(2, cluster.world, "train.ema=[0.9]")
    engine = make(config, ds)
    train(engine, config, range(1))
    save_checkpoint(engine, place, state=TrainState(step=1), data={}, last=1, every=0)
    engine.close()
    saved = find_checkpoint(place, say=print)
    assert saved is not None
    sentences = []
    for other in ("[]", "[0.99]"):
        config, ds = settings(2, cluster.world, f"train.ema={other}")
        engine = make(config, ds)
        try:
            load_checkpoint(engine, saved)
        except UsageError as error:
            sentences.append(str(error))
        engine.close()
    try:
        consolidate(saved.directory, ema=0.99)
    except EnvironmentFault as error:
        sentences.append(str(error))
    return sentences


@pytest.mark.slow
def test_other_averages_than_the_checkpoint_holds_are_refused(tmp_path):
    ((without, other, missing),) = run_ranks(1, saved_with_one_average, tmp_path)
    assert "step-00000001 does not continue with this train.ema: it has 0.9, the command none" in without
    assert "it has 0.9, the command 0.99" in other
    assert missing.endswith("holds no moving average with the decay 0.99")
