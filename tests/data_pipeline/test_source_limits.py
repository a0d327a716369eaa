"""Laws of inputs nobody should read: too long for memory, or without an end. The source says so at once."""

import os
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.listing import write_listing
from data_pipeline.source import Unusable
from data_pipeline.sources.open import open_source
from tests.data_pipeline.test_source_tars import write_tar


def inputs(root: Path) -> dict[str, str]:
    """The same three inputs behind each kind of source; the last claims a terabyte, and holds none of it on disk."""
    for number, size in enumerate((10, 11, 2**40)):
        path = root / "folder" / "a" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        os.truncate(path, size)
    (root / "t.csv").write_text("path\n" + "".join(f"folder/a/{number}.jpg\n" for number in range(3)))
    tar = write_tar(root / "a.tar", [(f"{number}.jpg", bytes(size)) for number, size in enumerate((10, 11, 0))])
    with open(tar, "r+b") as file:  # the third header, its size in base 256 and its checksum, then a hole
        file.seek(2 * 1024)
        header = bytearray(file.read(512))
        header[124:136] = b"\x80" + (2**40).to_bytes(11, "big")
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        file.seek(2 * 1024)
        file.write(header)
        file.truncate(3 * 1024 - 512 + 2**40 + 1024)
    return {"imagefolder": str(root / "folder"), "table": str(root / "t.csv"), "tars": str(tar), "webdataset": str(tar)}


@pytest.mark.parametrize("kind", ["imagefolder", "table", "tars", "webdataset"])
def test_what_is_too_long_is_not_read(tmp_path: Path, kind: str) -> None:
    source = open_source(f"{kind}:{inputs(tmp_path)[kind]}")
    listing = write_listing(source, tmp_path / "list")
    contents = list(source.read(listing.wanted(np.arange(3)), max_bytes=10))
    assert contents[0] == bytes(10)
    assert [content.reason for content in contents[1:] if isinstance(content, Unusable)] == ["too-many-bytes"] * 2


@pytest.mark.parametrize("kind", ["imagefolder", "table"])
def test_what_has_no_end_is_not_read(tmp_path: Path, kind: str) -> None:
    (tmp_path / "in" / "a").mkdir(parents=True)
    os.mkfifo(tmp_path / "in" / "a" / "pipe.jpg")
    (tmp_path / "t.csv").write_text("path\nin/a/pipe.jpg\n/dev/zero\n")
    source = open_source("imagefolder:" + str(tmp_path / "in") if kind == "imagefolder" else f"table:{tmp_path / 't.csv'}")
    listing = write_listing(source, tmp_path / "list")
    contents = list(source.read(listing.wanted(np.arange(len(listing)))))
    assert {content.reason for content in contents if isinstance(content, Unusable)} == {"not-a-file"}
    assert len(contents) == len(listing)
