"""Read bad files in a process of its own, and say of each what came of it: a crash or a hang is seen from outside.

python -m tests.helpers.judge images SEED COUNT    a line `NUMBER BUILD TRAINING SECONDS` per mutant, as soon as it is known
python -m tests.helpers.judge bombs FILE...        a line `NAME VERDICT SECONDS MEGABYTES` per file, read as a build does
python -m tests.helpers.judge trained FILE...      the same, read as training does

Seconds are those of the processor: other work on the machine does not count.
Verdicts: decoded, bad:REASON, refused:KIND, or raised:EXCEPTION, which nothing should be.
"""

import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_pipeline.augment import fill_train
from data_pipeline.config import AugmentConfig
from data_pipeline.decode import BadImage, decode_full
from data_pipeline.places import reading
from data_pipeline.tar_index import PIXELS_MAX, contents_of
from data_pipeline.tars import BadTar
from tests.helpers.mutants import mutants


def main() -> None:
    mode, *words = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))  # what is not refused shall not take the machine with it
    if mode == "images":
        for number, content in enumerate(mutants(int(words[1]), seed=int(words[0]))):
            started_at_s = time.process_time()
            verdicts = image_verdicts(content, number)
            print(number, *verdicts, f"{time.process_time() - started_at_s:.3f}", flush=True)
    else:
        for word in words:
            judge_bomb(Path(word), is_trained=mode == "trained")


def image_verdicts(content: bytes, number: int) -> tuple[str, str]:
    """Of the build and of training."""
    return _verdict(lambda: decode_full(content, max_pixels=PIXELS_MAX)), _verdict(lambda: _train(content, number))


def _train(content: bytes, number: int) -> None:
    out = np.zeros((32, 32, 3), np.uint8)
    fill_train(out, content, orientation=1 + number % 8, augment=AugmentConfig(), seed=1, position=number)


def _verdict(act: Callable[[], object]) -> str:
    try:
        found = act()
    except BadImage as bad:
        return f"bad:{bad.reason}"
    except BadTar:
        return "refused:BadTar"
    except BaseException as error:
        return f"raised:{type(error).__name__}"
    return found if isinstance(found, str) else "decoded"


def judge_bomb(path: Path, *, is_trained: bool) -> None:
    """In a child of this clean process, so that each bomb finds the same memory."""
    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        if status:
            print(path.name, f"died:{os.waitstatus_to_exitcode(status)}", 0, 0, flush=True)
        return
    content = path.read_bytes() if path.suffix != ".tar" else b""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before, started_at_s = _peak_mb(), time.process_time()
    if is_trained:
        verdict = _verdict(lambda: _train(content, 0))
    else:
        verdict = _verdict(lambda: _index(path) if path.suffix == ".tar" else decode_full(content, max_pixels=PIXELS_MAX))
    print(path.name, verdict, f"{time.process_time() - started_at_s:.3f}", f"{_peak_mb() - before:.1f}", flush=True)
    os._exit(0)


def _index(path: Path) -> str:
    with reading(path) as read_at:
        rows, rejects = contents_of(read_at, path.stat().st_size, tar=path.name, classes=(), is_full=True)
    return f"rows:{len(rows)},rejects:{'+'.join(sorted({reject.reason for reject in rejects}))}"


def _peak_mb() -> float:
    text = Path("/proc/self/status").read_text()
    return int(text.partition("VmHWM:")[2].split()[0]) / 1000


if __name__ == "__main__":
    main()
