"""Bad images and bombs: no crash, no hang, no flood of memory, and a verdict for every one.

They are read in a process of their own (tests/helpers/judge.py), so that a crash ends that process and not the tests.
"""

import selectors
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest

from data_pipeline.decode import Reason, decode_full, image_header
from tests.helpers.mutants import mutants, whole_images, write_bombs

ROOT = Path(__file__).resolve().parents[2]
HANG_S = 5.0
SILENCE_S = 60.0  # several times longer, because the machine may be busy
SECONDS_MAX, MEGABYTES_MAX = 1.0, 64.0
VERDICTS = {"decoded", *(f"bad:{reason}" for reason in get_args(Reason))}


def judged(*words: str, wait_s: float) -> list[list[str]]:
    """Lines of the judge, each split into words. Fails when it is silent for `wait_s`, or does not end well."""
    command = [sys.executable, "-m", "tests.helpers.judge", *words]
    lines: list[list[str]] = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(process.stdout, selectors.EVENT_READ, lines)
                selector.register(process.stderr, selectors.EVENT_READ)
                text, said = b"", b""
                is_first = True
                while selector.get_map():
                    ready = selector.select(timeout=wait_s + 30 * is_first)  # the first line waits for imports
                    assert ready, f"{words[0]}: no verdict for {wait_s} s after {lines[-1:]}"
                    is_first = False
                    for key, _ in ready:
                        piece = key.fileobj.read1(65536)  # type: ignore[union-attr]
                        if not piece:
                            selector.unregister(key.fileobj)
                        elif key.data is None:
                            said = (said + piece)[-2000:]
                        else:
                            *whole, text = (text + piece).split(b"\n")
                            lines += [line.decode().split() for line in whole]
            code = process.wait(timeout=10)
        finally:
            process.kill()
    assert code == 0, f"{words[0]}: ended with {code} after {lines[-1:]}: {said.decode(errors='replace')}"
    return lines


def check_mutants(count: int) -> Counter[str]:
    lines = judged("images", "1", str(count), wait_s=SILENCE_S)
    assert [int(line[0]) for line in lines] == list(range(count))
    for number, build, training, seconds in lines:
        assert float(seconds) <= HANG_S, f"mutant {number}: {seconds} s"
        assert {build, training} <= VERDICTS, f"mutant {number}: {build} {training}"
        # What the build lets in, training can read.
        assert build != "decoded" or training == "decoded", f"mutant {number}: {build} {training}"
    return Counter(line[1] for line in lines)


def test_every_whole_image_decodes() -> None:
    for content in whole_images():
        header = image_header(content)
        assert decode_full(content, max_pixels=10**6).shape == (header.height, header.width, 3) == (90, 120, 3)


def test_mutants_are_the_same_every_time() -> None:
    first, second = list(mutants(60, seed=3)), list(mutants(60, seed=3))
    assert first == second
    assert len(set(first)) > 50


def test_some_mutants_get_a_verdict() -> None:
    verdicts = check_mutants(150)
    assert verdicts["decoded"] > 15
    assert sum(verdicts.values()) - verdicts["decoded"] > 75


@pytest.mark.slow
def test_five_thousand_mutants_get_a_verdict() -> None:
    verdicts = check_mutants(5000)
    assert {"bad:truncated", "bad:decode-error", "bad:unknown-format", "bad:too-many-pixels", "decoded"} <= set(verdicts)


# A bomb is refused, or it is read without what is too much in it.
EXPECTED = {
    "pixels.png": "bad:too-many-pixels",
    "text.png": "",
    "itext.png": "",
    "profile.png": "",
    "overfull.png": "",
    "exif.jpg": "",
    "profile.jpg": "",
    "pixels.jpg": "bad:too-many-pixels",
    "scans.jpg": "bad:decode-error",
    "segments.jpg": "bad:decode-error",
    "fill.jpg": "",
    "stuffed.jpg": "",
    "chunks.png": "bad:decode-error",
    "chunks.webp": "bad:decode-error",
    "pixels.webp": "bad:too-many-pixels",
    "sparse.tar": "refused:BadTar",
    "paxsparse.tar": "refused:BadTar",
    "gzip.tar": "refused:BadTar",
    "paxheader.tar": "refused:BadTar",
    "longnames.tar": "refused:BadTar",
    "nested.tar": "rows:0,rejects:no-image",
    "labels.tar": "rows:0,rejects:bad-label",
    "cut.tar": "refused:BadTar",
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks of memory are read from /proc")
def test_bombs_cost_neither_time_nor_memory(tmp_path: Path) -> None:
    bombs = write_bombs(tmp_path)
    lines = judged("bombs", *map(str, bombs), wait_s=60)
    assert [line[0] for line in lines] == list(EXPECTED)
    for name, verdict, seconds, megabytes in lines:
        assert verdict == EXPECTED[name] if EXPECTED[name] else verdict in VERDICTS, f"{name}: {verdict}"
        assert float(seconds) <= SECONDS_MAX, f"{name}: {seconds} s"
        assert float(megabytes) <= MEGABYTES_MAX, f"{name}: {megabytes} MB"
    trained = judged("trained", *(str(path) for path in bombs if path.name.startswith("pixels")), wait_s=60)
    assert [line[:2] for line in trained] == [[f"pixels.{kind}", "bad:too-many-pixels"] for kind in ("png", "jpg", "webp")]
    assert all(float(seconds) <= SECONDS_MAX and float(megabytes) <= MEGABYTES_MAX for _, _, seconds, megabytes in trained)
