"""The law of long tables: ten million rows are planned in less than 2 GB."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
ROWS = 10_000_000


@pytest.mark.slow
def test_ten_million_rows_are_planned_in_less_than_two_gigabytes(tmp_path: Path) -> None:
    """Taking over the scan, duplicates, splits, rejects, permutation, and the first shards, in a process of its own."""

    def run(*words: str) -> str:
        command = [sys.executable, "-m", "tests.helpers.long_table", *words]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=900, check=True).stdout

    run("make", str(tmp_path / "work"), str(ROWS))
    found = json.loads(run("plan", str(tmp_path / "work")))
    assert (found["rows"], found["images"], found["rejected"]) == (ROWS, 9_700_000, 300_000)
    assert found["peak_gb"] < 2
