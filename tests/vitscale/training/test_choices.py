"""A measured choice is made once, kept in the run, and taken from there."""

import json
from pathlib import Path

import pytest
import torch

from tests.helpers.ranks import run_ranks
from vitscale.base.cluster import Cluster
from vitscale.training import choices
from vitscale.training.choices import _decide, choose_attention

CPU = torch.device("cpu")
SHAPE = (2, 2, 16, 8)


def decide(run, wanted: str, shape: tuple[int, int, int, int] = SHAPE) -> tuple[str, str]:
    return _decide(run, wanted, shape_BHNK=shape, dtype=torch.float32, device=CPU)


@pytest.fixture
def measured(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes that were measured; the next measurement turns the winner round."""
    seen: list[tuple[int, ...]] = []

    def measure(shape_BHNK, *, dtype, device):
        seen.append(shape_BHNK)
        return {"flash": 1.0, "math": 2.0} if len(seen) % 2 else {"math": 1.0, "flash": 2.0}

    monkeypatch.setattr(choices, "measure_kernels", measure)
    return seen


def test_the_choice_is_stored_and_a_resume_takes_it(tmp_path, measured):
    kernel, sentence = decide(tmp_path, "measured")
    assert kernel == "flash"
    assert sentence == "attention kernel: flash (flash 1 ms, math 2 ms for 2x2x16x8 float32 on cpu)"
    assert decide(tmp_path, "measured") == (kernel, sentence) and len(measured) == 1
    stored = json.loads((tmp_path / "choices.json").read_text())["attention"]
    assert stored == {
        "kernel": "flash",
        "device": "cpu",
        "shape_BHNK": [2, 2, 16, 8],
        "dtype": "float32",
        "times_ms": {"flash": 1.0, "math": 2.0},
    }


def test_another_shape_is_measured_anew(tmp_path, measured):
    assert decide(tmp_path, "measured")[0] == "flash"
    assert decide(tmp_path, "measured", (4, 2, 16, 8))[0] == "math"
    assert measured == [SHAPE, (4, 2, 16, 8)]


def test_a_named_kernel_is_taken_where_it_runs_and_replaced_aloud_where_not(tmp_path, measured):
    assert decide(tmp_path, "math")[0] == "math"
    kernel, sentence = decide(tmp_path, "cudnn")
    assert kernel == "flash"
    assert sentence.startswith("attention kernel cudnn cannot run here, flash takes its place (")


def of_rank(cluster: Cluster, run: Path) -> str | None:
    said: list[str] = []
    rank = cluster.rank
    kernel = choose_attention(run, "math", shape_BHNK=SHAPE, dtype=torch.float32, device=CPU, rank=rank, say=said.append)
    assert len(said) == (rank == 0)
    own = choose_attention(run, "measured", shape_BHNK=SHAPE, dtype=torch.float32, device=CPU, rank=rank, say=said.append)
    assert own is None and (rank > 0 or said[-1] == "attention kernel: torch's own; nothing is measured on a CPU")
    return kernel


@pytest.mark.slow
def test_rank_0_decides_for_all(tmp_path):
    assert run_ranks(2, of_rank, tmp_path) == ["math", "math"]
