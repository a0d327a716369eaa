"""Write down what happened: metrics.jsonl, events.jsonl, TensorBoard, status.json, and one line a person can read.

Rank 0 is the only writer. metrics.jsonl has one JSON line per logged step, values of that very step; evaluations are
lines of their own. events.jsonl has one line per event, such as an image that turned out to be bad, with its step.
After a resume both hold each step once: lines past the restored step are dropped before the first new one. Only events that
tell what happened to the run itself stay.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from vitscale.base.files import write_bytes, write_json
from vitscale.base.progress import bytes_in_words, in_words

CONSOLE_INTERVAL_S = 2.0
STATUS_INTERVAL_S = 5.0
GROUP_OF = {
    **dict.fromkeys(("images_per_s", "mfu", "hfu", "memory_bytes", "image_size"), "speed"),
    **dict.fromkeys(("step_s", "data_wait_s", "forward_s", "backward_s", "optimizer_s", "communication_s"), "time"),
    **dict.fromkeys(("images_seen", "skipped", "bad_images"), "data"),
}
"""Group of a number in TensorBoard; all others are of the group train."""
LASTING_EVENTS = ("started", "hung", "died", "worker_died", "corrupt", "rollback", "save_failed")
"""What happened to the run or its machines: a resume from before keeps it."""


class Metrics:
    """All writers of a run; made on rank 0 only."""

    def __init__(
        self,
        run: Path,
        *,
        total_steps: int,
        work_until: Callable[[int], float] = float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`work_until` says how much of the work the first steps are, in any unit: steps may cost unequally much."""
        self.run = run
        self.work_until = work_until
        self.path = run / "metrics.jsonl"
        self.events_path = run / "events.jsonl"
        self.total_steps = total_steps
        self.clock = clock
        self._said_at_s = -math.inf
        self._status_at_s = -math.inf
        self._top1: float | None = None
        self._saved_step: int | None = None
        self._has_spoken_of_events = False

    def open(self, restored_step: int) -> None:
        """Drop what lies past the restored step, then open for appending."""
        drop_lines_past(self.path, restored_step)
        drop_lines_past(self.events_path, restored_step)
        self._board = SummaryWriter(str(self.run / "tensorboard"), purge_step=restored_step + 1)
        self._file = open(self.path, "a", buffering=1)  # noqa: SIM115
        self._events = open(self.events_path, "a", buffering=1)  # noqa: SIM115
        self._log = open(self.run / "log.txt", "a", buffering=1)  # noqa: SIM115
        self._started_at_s, self._started_step = self.clock(), restored_step

    def reopen(self, restored_step: int) -> None:
        """The same after a rollback, in mid-run."""
        self.close()
        self._saved_step = restored_step
        self.open(restored_step)

    def log_step(self, line: dict[str, Any]) -> None:
        """One logged step: to the file, to TensorBoard, and now and then to the screen."""
        self._write(line)
        for name, value in line.items():
            if isinstance(value, int | float) and name not in ("step", "at_unix_s"):
                self._board.add_scalar(f"{GROUP_OF.get(name, 'train')}/{name}", value, line["step"])
        now_s, is_last = self.clock(), line["step"] == self.total_steps
        if is_last or now_s - self._said_at_s >= CONSOLE_INTERVAL_S:
            self._said_at_s = now_s
            self.say(self._sentence(line, now_s))
        if is_last or now_s - self._status_at_s >= STATUS_INTERVAL_S:
            self._status_at_s = now_s
            write_json(self.run / "status.json", {"phase": "training", "total_steps": self.total_steps, **_finite(line)})

    def log_eval(self, step: int, scores: dict[str, Any]) -> None:
        """An evaluation after `step` steps; under "ema" those of the moving averages, by decay."""
        ema = scores.get("ema", {})
        own = {name: value for name, value in scores.items() if name != "ema"}
        self._write({"step": step, "eval": own, **({"ema": ema} if ema else {})})
        for tag, values in [("eval", own), *((f"eval_ema_{decay}", of_average) for decay, of_average in ema.items())]:
            for name, value in values.items():
                self._board.add_scalar(f"{tag}/{name}", value, step)
        self._top1 = own["top1"]
        averages = "".join(f", ema {decay} {of_average['top1']:.2%}" for decay, of_average in ema.items())
        self.say(
            f"evaluated after step {step}: top-1 {own['top1']:.2%}{averages}, loss {own['loss']:.4f}, {own['images']} images"
        )

    def log_attention(self, step: int, picture_HWC: np.ndarray, scalars: dict[str, float]) -> None:
        """What attention looks like after `step` steps, to TensorBoard alone: one picture (uint8) and numbers per block."""
        self._board.add_image("attention/image, last layer, rollout", picture_HWC, step, dataformats="HWC")
        for name, value in scalars.items():
            self._board.add_scalar(f"attention_{name}", value, step)

    def log_histograms(self, step: int, counts: dict[str, np.ndarray], edges: np.ndarray, scalars: dict[str, float]) -> None:
        """Histograms over `edges` (one more than counts), and numbers, to TensorBoard alone."""
        middles = (edges[:-1] + edges[1:]) / 2
        for name, numbers in counts.items():
            self._board.add_histogram_raw(
                name,
                min=float(edges[0]),
                max=float(edges[-1]),
                num=int(numbers.sum()),
                sum=float((numbers * middles).sum()),
                sum_squares=float((numbers * middles**2).sum()),
                bucket_limits=edges[1:].tolist(),
                bucket_counts=numbers.tolist(),
                global_step=step,
            )
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)

    def log_saved(self, step: int, *, blocked_s: float, flush_s: float, bytes_: int) -> None:
        """A checkpoint was committed: how long training stood still for it, and how long it was written beside."""
        self._saved_step = step
        for name, value in (("blocked_s", blocked_s), ("flush_s", flush_s), ("bytes", bytes_)):
            self._board.add_scalar(f"save/{name}", value, step)

    def log_trouble(self, event: dict[str, Any], sentence: str) -> None:
        """Something went wrong and training goes on: to events.jsonl (with its "step" and "event") and in words."""
        self._write_events([event])
        self.say(sentence)

    def log_events(self, events: list[dict[str, Any]]) -> None:
        """Events in their order, each with its "step" and "event"; on the disk when this returns."""
        self._write_events(events)
        if not self._has_spoken_of_events and any(event["event"] == "bad_image" for event in events):
            self._has_spoken_of_events = True
            self.say(f"an image was bad and another was shown in its place; {self.events_path} names every one")

    def _write_events(self, events: list[dict[str, Any]]) -> None:
        now_s = self.clock()
        for event in events:
            self._events.write(json.dumps(_finite({**event, "at_unix_s": now_s})) + "\n")
        os.fsync(self._events.fileno())

    def stopped(self, step: int, reason: str) -> None:
        """The last word about a run that was asked to stop and is saved; then close."""
        record = {
            "phase": "stopped",
            "reason": reason,
            "step": step,
            "total_steps": self.total_steps,
            "at_unix_s": self.clock(),
        }
        write_json(self.run / "status.json", record)
        self.say(f"stopped after step {step} because {reason}; the same command continues")
        self.close()

    def say(self, sentence: str) -> None:
        """Print a sentence and keep it in log.txt."""
        print(sentence, flush=True)
        self._log.write(sentence + "\n")

    def finish(self, record: dict[str, Any]) -> None:
        """The last word about a finished run: to status.json and to the screen; then close."""
        scores = record["eval"]
        result = f": top-1 {scores['top1']:.2%} on {scores['images']} images" if scores else ""
        write_json(self.run / "status.json", _finite({"phase": "finished", "total_steps": self.total_steps, **record}))
        self.say(f"finished after {record['step']} steps{result}; the run is in {self.run}")
        self.close()

    def close(self) -> None:
        self._board.close()
        self._file.close()
        self._events.close()
        self._log.close()

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(_finite(line)) + "\n")

    def _sentence(self, line: dict[str, Any], now_s: float) -> str:
        now, start, end = (self.work_until(step) for step in (line["step"], self._started_step, self.total_steps))
        rest_s = (end - now) * (now_s - self._started_at_s) / (now - start) if now > start else 0.0
        wait = line["data_wait_s"] / line["step_s"] if line["step_s"] else 0.0
        parts = [
            f"step {line['step']}/{self.total_steps}",
            f"loss {line['loss']:.4f}",
            f"lr {line['lr']:.2e}",
            f"gn {line['grad_norm']:.2f}",
            f"{line['images_per_s']:.0f} img/s",
            *([f"mfu {line['mfu']:.1%}"] if line["mfu"] is not None else []),
            f"data {wait:.1%}",
            f"mem {bytes_in_words(line['memory_bytes'])}",
            *([f"skipped {line['skipped']}"] if line["skipped"] else []),
            *([f"bad images {line['bad_images']}"] if line["bad_images"] else []),
            *([f"top-1 {self._top1:.2%}"] if self._top1 is not None else []),
            f"ETA {in_words(rest_s)}",
            *([f"saved {self._saved_step}"] if self._saved_step is not None else []),
        ]
        return "  ".join(parts)


def _finite(value: Any) -> Any:
    """Non-finite numbers as text, also inside records: JSON has no word for them."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics file; a torn line, left by a kill or a lost power supply, is ignored."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return lines


def append_event(run: Path, event: dict[str, Any]) -> None:
    """One event that happened to the machine, by any rank: such an event is no part of what a resume does again."""
    with open(run / "events.jsonl", "ab", buffering=0) as file:
        file.write((json.dumps({**event, "at_unix_s": time.time()}) + "\n").encode())
        os.fsync(file.fileno())


def drop_lines_past(path: Path, step: int) -> None:
    """Rewrite the file without the lines of later steps, but for events that last, and without torn ones."""
    if not path.is_file():
        return
    kept = [line for line in read_lines(path) if line["step"] <= step or line.get("event") in LASTING_EVENTS]
    write_bytes(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
