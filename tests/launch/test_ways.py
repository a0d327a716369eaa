"""What ds_config.json says about kernel and compiler reaches the run, and changes no loss beyond rounding."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.program import SMALL, curve, run
from vitscale.base.files import read_json

ROOT = Path(__file__).resolve().parents[2]
SIX_STEPS = ("train.length=6", "run.save_every=0", "optim.micro_batch_max=48")


@pytest.mark.slow
def test_compiled_blocks_train_like_plain_ones(tmp_path):
    """In processes of their own: a compiler that starts workers does not survive the fork of the other tests."""
    for word in ("none", "blocks"):
        settings = [f"ds.vitscale.compile={word}", "ds.vitscale.recompute=2", "train.drop_path=0.25"]
        command = [sys.executable, "launch/pretrain.py", "--run", str(tmp_path / word), *SMALL, *SIX_STEPS, *settings]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        assert "not compiled" not in done.stderr
        assert ("compiled blocks" in done.stdout) == (word == "blocks")
    plain, compiled = (curve(tmp_path / word, "loss", "grad_norm") for word in ("none", "blocks"))
    assert len(plain) == 6 and plain != compiled, "fused sums round otherwise: equal bits would mean nothing was compiled"
    for (_, loss, norm), (_, other_loss, other_norm) in zip(plain, compiled, strict=True):
        assert other_loss == pytest.approx(loss, rel=1e-5) and other_norm == pytest.approx(norm, rel=1e-4)


@pytest.mark.slow
def test_a_named_kernel_is_measured_said_stored_and_reused(tmp_path):
    arguments = ["--run", tmp_path / "run", *SMALL, *SIX_STEPS]
    said = run("pretrain", *arguments, "ds.vitscale.attention=cudnn", said=tmp_path / "said.txt")
    assert "attention kernel cudnn cannot run here, " in said and " takes its place (" in said
    stored = read_json(tmp_path / "run" / "choices.json")["attention"]
    assert stored["shape_BHNK"] == [48, 2, 17, 16] and set(stored["times_ms"]) == {"flash", "math"}
    (tmp_path / "run" / "FINISHED.json").unlink()
    said = run("pretrain", *arguments, "ds.vitscale.attention=math", said=tmp_path / "again.txt")
    assert "attention kernel: math, as ds_config says (" in said
    assert read_json(tmp_path / "run" / "choices.json")["attention"] == stored, "measured once"


@pytest.mark.slow
def test_stochastic_depth_resumes_bit_for_bit(tmp_path):
    """Draws are keyed by where they stand, so a run cut in two equals one in a piece."""
    settings = [*SMALL, "train.length=8", "train.drop_path=0.5", "optim.micro_batch_max=12"]
    run("pretrain", "--run", tmp_path / "whole", *settings, "run.save_every=4", said=tmp_path / "whole.txt")
    run("pretrain", "--run", tmp_path / "dry", *settings, "train.drop_path=0", said=tmp_path / "without.txt")
    whole = curve(tmp_path / "whole", "loss", "grad_norm")
    assert whole != curve(tmp_path / "dry", "loss", "grad_norm")
    for name in ("FINISHED.json",):
        (tmp_path / "whole" / name).unlink()
    last = tmp_path / "whole" / "checkpoints" / "step-00000008"
    last.rename(last.with_name("aside"))
    said = run("pretrain", "--run", tmp_path / "whole", *settings, "run.save_every=4", said=tmp_path / "again.txt")
    assert "continuing after step 4" in said
    assert curve(tmp_path / "whole", "loss", "grad_norm") == whole
