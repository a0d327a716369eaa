"""A checkpoint from elsewhere, its record sealed anew by whoever changed it: nothing outside is opened, nothing in it runs."""

import errno
import hashlib
import json
import os
import pickle
import socket
from pathlib import Path

import pytest
import torch

from vitscale.base.errors import EnvironmentFault
from vitscale.base.files import sha256_file, write_json
from vitscale.training import checkpoint
from vitscale.training.checkpoint import RECORD, SCHEMA_VERSION, newest_valid, sealed, verify
from vitscale.training.partitions import StoredState

FINE = "mp_rank_00_model_states.pt"
CONTENT = b"what the names lead to"


def forged(checkpoints: Path, *names: object, **changes: object) -> Path:
    """A step directory whose record names these files, each with the right size and hash."""
    path = checkpoints / "step-00000004"
    path.mkdir(parents=True, exist_ok=True)
    (path / FINE).write_bytes(CONTENT)
    entry = {"bytes": len(CONTENT), "sha256": hashlib.sha256(CONTENT).hexdigest()}
    record = {
        "schema_version": SCHEMA_VERSION,
        "state": {"step": 4},
        "files": [{"name": name, **entry} for name in (FINE, *names)],
    }
    write_json(path / RECORD, sealed(record | changes))
    return path


@pytest.fixture
def opened(monkeypatch):
    """Names of the files that were hashed."""
    found: list[str] = []
    monkeypatch.setattr(checkpoint, "sha256_file", lambda path: (found.append(Path(path).name), sha256_file(path))[1])
    return found


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../outside",
        "../../outside",
        "a/../../outside",
        "ABSOLUTE",
        "inner/file",
        "./mp_rank_00_model_states.pt",
        "a\0b",
        "a\nb",
        "a\\b",
        ".hidden",
        "a" * 300,
        None,
        7,
        ["a"],
        {"a": 1},
    ],
)
def test_a_name_that_leads_elsewhere_is_refused_before_anything_is_opened(tmp_path, opened, name):
    assert verify(forged(tmp_path / "fine"))[0] is None and opened == [FINE]
    opened.clear()
    checkpoints = tmp_path / "run" / "checkpoints"
    for place in (checkpoints, tmp_path / "run", tmp_path, checkpoints / "step-00000004" / "inner"):
        place.mkdir(parents=True, exist_ok=True)
        (place / "outside").write_bytes(CONTENT)
        (place / "file").write_bytes(CONTENT)
    path = forged(checkpoints, str(tmp_path / "outside") if name == "ABSOLUTE" else name)
    complaint, _ = verify(path)
    assert complaint is not None and complaint.startswith(f"{RECORD} names ") and opened == []
    with pytest.raises(EnvironmentFault, match="no usable checkpoint"):
        newest_valid(checkpoints)


@pytest.mark.parametrize("name", [FINE, FINE.upper()])
def test_a_name_that_stands_there_twice_is_refused(tmp_path, opened, name):
    path = forged(tmp_path, name)
    (path / name).write_bytes(CONTENT)
    complaint, _ = verify(path)
    assert complaint is not None and complaint.startswith(f"{RECORD} names ") and opened == []


def link(path: Path) -> None:
    outside = path.parent.parent / "outside"
    outside.write_bytes(CONTENT)
    path.symlink_to(outside)


def bound(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        os.chdir(path.parent)  # names of sockets are short
        listener.bind(path.name)


@pytest.mark.parametrize("make", [link, os.mkfifo, Path.mkdir, bound], ids=["link", "pipe", "directory", "socket"])
def test_what_is_no_file_of_the_directory_itself_is_refused_unread(tmp_path, opened, monkeypatch, make):
    monkeypatch.chdir(tmp_path)
    path = forged(tmp_path / "checkpoints", "second.pt")
    make(path / "second.pt")
    complaint, _ = verify(path)
    assert complaint is not None and "second.pt is no regular file" in complaint and "second.pt" not in opened


def test_a_file_on_a_bad_sector_is_a_complaint(tmp_path, monkeypatch):
    path = forged(tmp_path, "second.pt")
    (path / "second.pt").write_bytes(CONTENT)
    assert verify(path)[0] is None

    def read(place: Path) -> str:
        if place.name == "second.pt":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return sha256_file(place)

    monkeypatch.setattr(checkpoint, "sha256_file", read)
    assert verify(path)[0] == "second.pt cannot be read (Input/output error)"


@pytest.mark.parametrize(
    "record",
    [
        {"state": {}},
        {"state": None},
        {"state": {"step": "4"}},
        {"state": {"step": [4]}},
        {"files": None},
        {"files": [7]},
        {"files": [{"name": FINE}]},
        {"files": [{"name": FINE, "bytes": "1", "sha256": 7}]},
    ],
)
def test_a_sealed_record_without_sense_is_a_complaint_too(tmp_path, record):
    complaint, _ = verify(forged(tmp_path, **record))
    assert complaint is not None


def test_a_record_as_deep_as_a_well_is_a_complaint(tmp_path):
    path = forged(tmp_path)
    (path / RECORD).write_text("[" * 200_000)
    assert verify(path)[0] == f"{RECORD} is no valid JSON"


class Canary:
    """Runs a command where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_code_in_a_file_of_a_checkpoint_does_not_run(tmp_path):
    sung = tmp_path / "sung"
    checkpoints = tmp_path / "checkpoints" / "step-00000004"
    checkpoints.mkdir(parents=True)
    torch.save({"module": {}, "optimizer": Canary(sung)}, checkpoints / FINE)
    piece = {"name": "w", "shape": [1], "start": 0, "numel": 1, "offset": 0, "group": 0}
    maps = {"schema_version": 2, "rank": 0, "world": 1, "zero_stage": 0, "pieces": [piece]}
    (checkpoints / "partition-00000.json").write_text(json.dumps(maps))
    with pytest.raises((EnvironmentFault, pickle.UnpicklingError)):
        StoredState(checkpoints).fill(torch.zeros(1), "w", 0, "weights")
    assert not sung.exists()
    torch.load(checkpoints / FINE, weights_only=False)
    assert sung.exists(), "the canary sings where it may"
