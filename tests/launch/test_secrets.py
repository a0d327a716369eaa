"""No secret is stored or shown: not by a run, not by an error, not in the list of processes."""

import contextlib
import subprocess
import time
from pathlib import Path

import pytest

from tests.helpers.program import SMALL, run, start

pytestmark = pytest.mark.slow

SECRETS = {"AWS_SECRET_ACCESS_KEY": "wJalr7SEED/1", "HF_TOKEN": "hf_SEED2", "WANDB_API_KEY": "SEED3", "MY_PASSWORD": "SEED4"}
TINY = (*SMALL, "train.length=12", "run.save_every=4")


def holders(place: Path, text: str) -> list[str]:
    """Files below `place` that hold the text."""
    return [str(path) for path in place.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def command_lines() -> str:
    """Of every process, as `ps` shows them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return "\n".join(found)


def test_no_secret_of_the_environment_is_in_a_run_in_a_crash_or_in_the_list_of_processes(tmp_path):
    directory = tmp_path / "run"
    fault = {"VITSCALE_FAULT": "raise@step.end:step=11"}
    program = start("pretrain", "--run", directory, *TINY, said=tmp_path / "said.txt", env=SECRETS | fault, cores=1)
    seen = ""
    while not (directory / "metrics.jsonl").exists() and "Traceback" not in program.text:
        time.sleep(0.3)
        seen += command_lines()
    assert program.wait() == [1] and "Traceback" in program.text, program.text
    assert (directory / "provenance" / "attempt-001.json").is_file() and (directory / "log.txt").is_file()
    assert seen
    for secret in SECRETS.values():
        assert holders(tmp_path, secret) == [] and secret not in seen


@pytest.mark.parametrize(
    ("flag", "url", "code"),
    [
        ("--data", "s3://AKIASEED1:SEED2@bucket/set", 2),
        ("--data", "s3://AKIASEED1:SE/SEED2@bucket/set", 2),
        ("--data", "http://SEED1:SEED2@127.0.0.1:9/set", 2),
        ("--data", "https://127.0.0.1:9/set?token=SEED1", 2),
        ("--data", "s3://SEED1:SEED2@bucket/set=0", 2),
        ("--data", "ftp://SEED1:SEED2@host/set", 2),
        ("--eval-data", "http://SEED1:SEED2@127.0.0.1:9/set", 2),
        ("--from", "https://SEED1:SEED2@host/run", 2),
    ],
)
def test_credentials_in_a_url_are_refused_and_not_repeated(tmp_path, flag, url, code):
    script = "finetune" if flag == "--from" else "pretrain"
    words = [flag, url, "--run", tmp_path / "run", *(TINY if flag != "--from" else ())]
    said = run(script, *words, said=tmp_path / "said.txt", code=code)
    assert "SEED" not in said and said.count("error:") == 1 and "Traceback" not in said
    assert holders(tmp_path, "SEED") == [], "nothing of it is stored"


def test_a_tool_repeats_no_credentials_either(tmp_path):
    for script, words in {
        "evaluate": ("--from", "runs/none", "--data", "s3://SEED1:SEED2@bucket/set"),
        "build_shards": ("webdataset:s3://SEED1:SEED2@bucket/set", "--out", tmp_path / "out"),
        "inspect_shards": ("info", "https://SEED1:SEED2@127.0.0.1:9/set"),
    }.items():
        program = start(script, *words, said=tmp_path / f"{script}.txt")
        assert program.wait()[0] in (2, 3), program.text
        assert "SEED" not in program.text and "Traceback" not in program.text, program.text


def test_the_version_of_the_code_is_asked_for_without_a_shell(tmp_path, monkeypatch):
    """The only program that a run starts gets fixed words."""
    from vitscale.training import rundir

    asked = []
    monkeypatch.setattr(subprocess, "run", lambda words, **options: asked.append((words, options)) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rundir._code_revision()
    ((words, options),) = asked
    assert words[0] == "git" and isinstance(words, list) and not options.get("shell") and options["timeout"] == 10
