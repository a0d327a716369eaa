"""Law 3: a damaged checkpoint is named and passed over; a run whose checkpoints are all damaged does not start."""

import shutil

import pytest

from tests.helpers.program import SMALL, curve, run, start

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory):
    """A run killed at step 22 with checkpoints of steps 5, 10, 15 and 20, and the curve of an undisturbed one."""
    base = tmp_path_factory.mktemp("damage")
    arguments = [*SMALL, "run.save_every=5", "run.keep_last=4", "run.eval_every=0"]
    run("pretrain", "--run", base / "quiet", *arguments, said=base / "quiet.txt", world=2)
    env = {"VITSCALE_FAULT": "kill@step.end:step=22"}
    start("pretrain", "--run", base / "stopped", *arguments, said=base / "stopped.txt", world=2, env=env).wait()
    return base / "stopped", curve(base / "quiet", "loss", "samples_hash")


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "cut": ("*zero_pp_rank_1_mp_rank_00_optim_states.pt", cut, "bytes instead of"),
    "flipped": ("*zero_pp_rank_0_mp_rank_00_optim_states.pt", flip_a_bit, "does not have its recorded sha256"),
    "gone": ("mp_rank_00_model_states.pt", lambda path: path.unlink(), "is missing"),
    "unmarked": ("vitscale.json", lambda path: path.unlink(), "vitscale.json is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(stopped_run, tmp_path, damage):
    source, expected = stopped_run
    directory = tmp_path / "r"
    shutil.copytree(source, directory)
    pattern, harm, complaint = DAMAGES[damage]
    (victim,) = (directory / "checkpoints" / "step-00000020").glob(pattern)
    harm(victim)
    said = run("pretrain", "--run", directory, said=tmp_path / "said.txt", world=2)
    assert f"checkpoint step-00000020 is not usable: {victim.name}" in said and complaint in said
    assert "continuing after step 15" in said
    assert (directory / "checkpoints" / "step-00000020.bad-1").is_dir()
    assert curve(directory, "loss", "samples_hash") == expected


def test_with_all_checkpoints_damaged_the_command_refuses_every_time(stopped_run, tmp_path):
    source, _ = stopped_run
    directory = tmp_path / "r"
    shutil.copytree(source, directory)
    for path in (directory / "checkpoints").glob("step-*/vitscale.json"):
        cut(path)
    lines_before = (directory / "metrics.jsonl").read_bytes()
    for attempt in range(2):
        said = run("pretrain", "--run", directory, said=tmp_path / f"{attempt}.txt", world=2, code=3)
        assert "none is usable" in said and "Traceback" not in said
    assert (directory / "metrics.jsonl").read_bytes() == lines_before
