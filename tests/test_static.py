"""The tree is clean for the linter, the formatter and the type checker, with the settings of pyproject.toml."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run_tool(*words: str) -> None:
    pytest.importorskip(words[0])
    ended = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, f"{' '.join(words)}\n{ended.stdout}{ended.stderr}"


@pytest.mark.slow
def test_ruff_check_is_clean():
    run_tool("ruff", "check", ".")


@pytest.mark.slow
def test_ruff_format_is_clean():
    run_tool("ruff", "format", "--check", ".")


@pytest.mark.slow
def test_mypy_is_clean():
    run_tool("mypy")
