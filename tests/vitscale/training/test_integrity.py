"""One flipped bit in a copy that all ranks must hold equally is found, with tensor and rank; equal copies never alarm."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.ranks import run_ranks
from tests.helpers.small_engine import make, settings, train
from vitscale.base.cluster import Cluster
from vitscale.training.integrity import CorruptReplica, Integrity, checksum, checksums, differing_replicas, minority

# ---- the checksum ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8])
def test_every_single_bit_changes_the_checksum(dtype):
    flat = torch.randn(23, generator=torch.Generator().manual_seed(1)).to(dtype) if dtype.is_floating_point else None
    tensor = flat if flat is not None else torch.arange(23).to(dtype)
    before = checksum(tensor).item()
    octets = tensor.view(torch.uint8)
    for bit in range(8 * len(octets)):
        octets[bit // 8] ^= 1 << bit % 8
        assert checksum(tensor).item() != before
        octets[bit // 8] ^= 1 << bit % 8
    assert checksum(tensor).item() == before


def test_it_is_the_sum_of_the_words_wherever_the_tensor_lies():
    """Replicas may begin at other places of their memory."""
    whole = torch.randn(100, generator=torch.Generator().manual_seed(2))
    assert checksum(whole).item() == whole.view(torch.int64).sum().item()
    for start in range(4):
        for length in range(9):
            part = whole[start : start + length]
            words = part[: length // 2 * 2].clone().view(torch.int64).sum().item()
            rest = part[length // 2 * 2 :].clone().view(torch.uint8).sum().item()
            assert checksum(part).item() == checksum(part.clone()).item() == words + rest


def test_what_is_not_contiguous_and_scalars_have_one_too():
    matrix = torch.randn(6, 4)
    assert checksum(matrix.T).item() == checksum(matrix.T.contiguous()).item()
    assert checksum(torch.tensor(7.0)).item() == torch.tensor([7.0]).view(torch.uint8).sum().item()


def test_without_replicas_there_is_nothing_to_compare():
    """Stage 3 that keeps nothing gathered, and a model without buffers."""
    names, sums = checksums(iter(()))
    assert names == [] and sums.shape == (0,)
    nothing: Any = SimpleNamespace(replicas=lambda: iter(()))
    assert differing_replicas(nothing) == {}


@pytest.mark.parametrize(
    ("values", "ranks"),
    [
        ([5, 5, 5], []),
        ([5, 9, 5], [1]),
        ([9, 5, 5], [0]),
        ([5, 9], [0, 1]),
        ([5, 9, 7], [0, 1, 2]),
        ([5, 5, 9, 9], [0, 1, 2, 3]),
        ([1, 5, 5, 9, 5], [0, 3]),
    ],
)
def test_more_than_half_of_the_ranks_are_believed(values, ranks):
    assert minority(values) == ranks


# ---- over ranks -----------------------------------------------------------------------------------------------------

FLIPS = 6


def flip(tensor: Tensor, place: int, bit: int) -> None:
    """One bit of one number."""
    whole = tensor.data.view(-1).view({4: torch.int32, 2: torch.int16, 8: torch.int64}[tensor.element_size()])
    whole[place] ^= torch.tensor(1, dtype=whole.dtype) << bit


def on_ranks(cluster: Cluster, stages: tuple[int, ...], flips: int) -> dict[int, Any]:
    found = {}
    for stage in stages:
        config, ds = settings(stage, cluster.world, "train.ema=[0.9]")
        engine = make(config, ds)
        quiet, seen = [], []
        for step in range(2):
            train(engine, config, range(step, step + 1))
            quiet.append(differing_replicas(engine))
        chance = random.Random(f"{stage} {cluster.world}")
        names = dict(engine.replicas())
        for number in range(flips):
            name, victim = chance.choice(sorted(names)), chance.randrange(cluster.world)
            tensor = names[name]
            # Sign, exponent, mantissa in turn.
            bit = [31, chance.randrange(23, 31), chance.randrange(23)][number % 3]
            place = chance.randrange(tensor.numel())
            if cluster.rank == victim:
                flip(tensor, place, bit)
            seen.append((name, victim, differing_replicas(engine)))
            if cluster.rank == victim and (stage == 0 or cluster.world > 2):
                flip(tensor, place, bit)  # else the masters have mended it
            quiet.append(differing_replicas(engine))
        integrity = Integrity(engine, every_steps=2, host=f"host-{cluster.rank}", metrics=None)
        integrity.check_when_due(2)
        name, tensor = next((name, tensor) for name, tensor in engine.replicas() if tensor.is_floating_point())
        if cluster.rank == cluster.world - 1:
            flip(tensor, 0, 3)
        integrity.check_when_due(3)
        with pytest.raises(CorruptReplica) as caught:
            integrity.check_when_due(4)
        Integrity(engine, every_steps=0, host="", metrics=None).check(4)
        found[stage] = (sorted(names), quiet, seen, name, str(caught.value))
        engine.close()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_a_flipped_bit_is_found_with_its_tensor_and_rank_and_nothing_else_is(world):
    by_rank = run_ranks(world, on_ranks, (0, 2, 3), FLIPS)
    assert all(found == by_rank[0] for found in by_rank), "all ranks say the same"
    for stage, (names, quiet, seen, name, said) in by_rank[0].items():
        assert all(differing == {} for differing in quiet), stage
        for tensor, victim, differing in seen:
            # Two ranks without masters to ask: nobody can tell whose copy is right.
            is_open = stage == 0 and world == 2
            assert differing == {tensor: list(range(world)) if is_open else [victim]}, (stage, tensor, victim)
        assert name in said and f"rank {world - 1} on host-{world - 1}" in said and "at step 4" in said
        assert ("exp_avg of head.weight" in names) == ("moving average 0.9/head.weight" in names) == (stage == 0)
        assert "patches.weight" in names or "patch_embedding.weight" in names or len(names) > 5, stage
