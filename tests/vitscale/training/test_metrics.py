"""Each step stands in metrics.jsonl once and exactly; the screen and status.json are told now and then."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vitscale.training.metrics import Metrics, drop_lines_past, read_lines


def line_of(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": step,
        "images_seen": 96 * step,
        "loss": 2.5 / step,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "images_per_s": 480.0,
        "mfu": None,
        "data_wait_s": 0.05,
        "step_s": 0.2,
        "memory_bytes": 123_456_789,
        "samples_hash": "00000000000000ff",
        "skipped": 0,
        "bad_images": 0,
        "at_unix_s": 1000.0 + step,
    } | changes


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def metrics_of(run: Path, *, restored: int = 0, total: int = 100, clock: Clock | None = None) -> Metrics:
    run.mkdir(exist_ok=True)
    metrics = Metrics(run, total_steps=total, clock=clock or Clock())
    metrics.open(restored)
    return metrics


def test_what_is_logged_is_read_back_exactly_and_at_once(tmp_path):
    metrics = metrics_of(tmp_path)
    lines = [line_of(1, loss=0.1 + 0.2), line_of(2, mfu=0.41)]
    for line in lines:
        metrics.log_step(line)
        assert read_lines(tmp_path / "metrics.jsonl")[-1] == line  # before close: a kill loses nothing
    metrics.close()
    assert read_lines(tmp_path / "metrics.jsonl") == lines


def test_an_evaluation_is_a_line_without_a_loss(tmp_path):
    metrics = metrics_of(tmp_path)
    metrics.log_step(line_of(1))
    metrics.log_eval(1, {"images": 360, "top1": 0.5, "top5": 0.9, "loss": 1.25})
    metrics.close()
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert lines[1] == {"step": 1, "eval": {"images": 360, "top1": 0.5, "top5": 0.9, "loss": 1.25}}
    assert [line["step"] for line in lines if "loss" in line] == [1]


def test_the_scores_of_moving_averages_stand_beside_those_of_the_weights(tmp_path, capsys):
    metrics = metrics_of(tmp_path)
    own, average = ({"images": 9, "top1": top1, "top5": 1.0, "loss": 0.5} for top1 in (0.5, 0.75))
    metrics.log_eval(1, {**own, "ema": {"0.999": average}})
    metrics.close()
    (line,) = read_lines(tmp_path / "metrics.jsonl")
    assert line == {"step": 1, "eval": own, "ema": {"0.999": average}}
    assert "top-1 50.00%, ema 0.999 75.00%, loss 0.5000, 9 images" in capsys.readouterr().out


@pytest.mark.parametrize(("value", "text"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_non_finite_numbers_are_texts_because_json_has_no_word_for_them(tmp_path, value, text):
    metrics = metrics_of(tmp_path)
    metrics.log_step(line_of(1, loss=value, grad_norm=value))
    metrics.log_eval(1, {"images": 360, "top1": 0.5, "top5": 0.9, "loss": value})
    metrics.close()

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    texts = [(tmp_path / "status.json").read_text(), *(tmp_path / "metrics.jsonl").read_text().splitlines()]
    status, step, evaluation = (json.loads(text, parse_constant=refuse) for text in texts)
    assert status["loss"] == step["loss"] == step["grad_norm"] == evaluation["eval"]["loss"] == text


def test_a_resume_drops_the_steps_past_the_checkpoint_and_only_those(tmp_path):
    metrics = metrics_of(tmp_path)
    for step in (1, 2, 3, 4):
        metrics.log_step(line_of(step))
        metrics.log_eval(step, {"images": 1, "top1": 0.0, "top5": 0.0, "loss": 1.0})
    metrics.close()
    metrics = metrics_of(tmp_path, restored=2)
    metrics.log_step(line_of(3, loss=9.0))
    metrics.close()
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [(line["step"], "eval" in line) for line in lines] == [(1, False), (1, True), (2, False), (2, True), (3, False)]
    assert lines[-1]["loss"] == 9.0
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = [(event.step, event.value) for event in board.Scalars("train/loss")]
    assert scalars == [(1, 2.5), (2, 1.25), (3, 9.0)]
    assert "train/at_unix_s" not in board.Tags()["scalars"]
    assert "eval/top1" in board.Tags()["scalars"]


def test_events_are_told_once_also_after_a_resume(tmp_path, capsys):
    metrics = metrics_of(tmp_path)
    metrics.log_events([{"step": 1, "event": "bad_image", "position": 7}, {"step": 2, "event": "bad_image", "position": 99}])
    metrics.log_events([{"step": 3, "event": "bad_image", "position": 120}])
    assert len(read_lines(tmp_path / "events.jsonl")) == 3  # before close: a kill loses nothing
    metrics.close()
    assert capsys.readouterr().out.count("events.jsonl names every one") == 1
    metrics = metrics_of(tmp_path, restored=1)
    metrics.log_events([{"step": 2, "event": "bad_image", "position": 99}])
    metrics.close()
    lines = read_lines(tmp_path / "events.jsonl")
    assert [(line["step"], line["position"], line["at_unix_s"]) for line in lines] == [(1, 7, 1000.0), (2, 99, 1000.0)]


def test_a_torn_last_line_is_ignored_and_gone_after_the_next_start(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = json.dumps(line_of(1)) + "\n"
    for torn in ('{"step": 2, "lo', "\0" * 40, '{"step": 2, "\udcff'.encode("utf-8", "surrogateescape").decode("latin-1")):
        path.write_text(whole + torn)
        assert read_lines(path) == [line_of(1)]
        drop_lines_past(path, 5)
        assert path.read_text() == whole


def test_a_resume_keeps_what_happened_to_the_run_and_drops_what_its_steps_will_say_again(tmp_path):
    metrics = metrics_of(tmp_path)
    kinds = ("started", "skipped_step", "rollback", "bad_image", "corrupt")
    events = [{"step": 5, "event": event, "loss": math.nan} for event in kinds]
    metrics.log_events(events)
    metrics.log_step(line_of(5))
    metrics.reopen(4)
    assert [(line["event"], line["loss"]) for line in read_lines(metrics.events_path)] == [
        ("started", "nan"),
        ("rollback", "nan"),
        ("corrupt", "nan"),
    ]
    metrics.log_step(line_of(5, loss=7.0))
    metrics.close()
    assert read_lines(metrics.path) == [line_of(5, loss=7.0)]


def test_one_damaged_line_takes_no_others_with_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(json.dumps(line_of(1)).encode() + b'\n{"st\xff\n' + json.dumps(line_of(2)).encode() + b"\n")
    assert [line["step"] for line in read_lines(path)] == [1, 2]


def test_no_file_yet_is_no_lines(tmp_path):
    assert read_lines(tmp_path / "metrics.jsonl") == []
    drop_lines_past(tmp_path / "metrics.jsonl", 3)
    assert os.listdir(tmp_path) == []


def test_the_screen_hears_of_a_step_every_two_seconds_and_of_the_last(tmp_path, capsys):
    clock = Clock()
    metrics = metrics_of(tmp_path, total=10, clock=clock)
    for step in range(1, 11):
        clock.now_s = 1000.0 + 0.5 * step
        metrics.log_step(line_of(step))
    metrics.close()
    said = capsys.readouterr().out.splitlines()
    assert [sentence.split()[1] for sentence in said] == ["1/10", "5/10", "9/10", "10/10"]
    assert (tmp_path / "log.txt").read_text().splitlines() == said
    # Half a second a step: five steps are left after the fifth.
    assert said[1] == "step 5/10  loss 0.5000  lr 1.00e-03  gn 0.50  480 img/s  data 25.0%  mem 123.5 MB  ETA 2s"


def test_the_eta_counts_work_where_later_steps_cost_more_and_the_last_checkpoint_is_told(tmp_path, capsys):
    clock = Clock()
    tmp_path.mkdir(exist_ok=True)
    # Steps from the 51st on cost three times as much.
    metrics = Metrics(tmp_path, total_steps=100, work_until=lambda step: step + 2 * max(0, step - 50), clock=clock)
    metrics.open(0)
    metrics.log_saved(40, blocked_s=0.1, flush_s=0.5, bytes_=1000)
    clock.now_s += 50.0
    metrics.log_step(line_of(50))
    metrics.close()
    assert capsys.readouterr().out.splitlines()[-1].endswith("ETA 2m30s  saved 40")


def test_the_sentence_tells_what_is_there_and_no_more(tmp_path, capsys):
    clock = Clock()
    metrics = metrics_of(tmp_path, restored=50, total=100, clock=clock)
    metrics.log_eval(50, {"images": 360, "top1": 0.9722, "top5": 1.0, "loss": 0.1})
    clock.now_s += 100.0
    metrics.log_step(line_of(75, mfu=0.412, skipped=2, bad_images=3))
    metrics.close()
    evaluated, sentence = capsys.readouterr().out.splitlines()
    assert evaluated == "evaluated after step 50: top-1 97.22%, loss 0.1000, 360 images"
    # 25 steps of this start took 100 s: the 25 that are left take as long, whatever was done before the resume.
    assert sentence.endswith("mfu 41.2%  data 25.0%  mem 123.5 MB  skipped 2  bad images 3  top-1 97.22%  ETA 1m40s")


def test_status_says_where_the_run_is_every_five_seconds_and_at_the_end(tmp_path):
    clock = Clock()
    metrics = metrics_of(tmp_path, total=10, clock=clock)
    seen = []
    for step in range(1, 11):
        clock.now_s = 1000.0 + 1.5 * step
        metrics.log_step(line_of(step))
        seen.append(json.loads((tmp_path / "status.json").read_text())["step"])
    assert seen == [1, 1, 1, 1, 5, 5, 5, 5, 9, 10]
    assert json.loads((tmp_path / "status.json").read_text()) == {"phase": "training", "total_steps": 10, **line_of(10)}
    record = {"step": 10, "images_seen": 960, "skipped": 0, "eval": None}
    metrics.finish(record)
    assert json.loads((tmp_path / "status.json").read_text()) == {"phase": "finished", "total_steps": 10, **record}


def test_a_stopped_run_says_why_and_that_it_can_go_on(tmp_path, capsys):
    metrics = Metrics(tmp_path, total_steps=10, clock=lambda: 1234.5)
    metrics.open(0)
    metrics.stopped(7, "SIGTERM came to rank 3")
    assert json.loads((tmp_path / "status.json").read_text()) == {
        "phase": "stopped",
        "reason": "SIGTERM came to rank 3",
        "step": 7,
        "total_steps": 10,
        "at_unix_s": 1234.5,
    }
    sentence = "stopped after step 7 because SIGTERM came to rank 3; the same command continues\n"
    assert capsys.readouterr().out == sentence == (tmp_path / "log.txt").read_text()
