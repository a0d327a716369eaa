"""The second epoch of a dataset needs no more memory than the first."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_memory_is_flat_over_two_epochs(tmp_path):
    """In a fresh process: 3 million images are more than the 2 million rows of indexes that are kept."""
    command = [sys.executable, "-m", "tests.measure.memory_of_order", "--shards", "300", "--read-every", "32"]
    command += ["--figure", str(tmp_path / "a.png")]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300).stdout
    growth_mb = float(said.split("(")[1].split(" MB)")[0])
    assert abs(growth_mb) < 15, said  # the indexes of a window more or less: 128 lanes, 0.4 MB each
    assert (tmp_path / "a.png").stat().st_size > 10_000
