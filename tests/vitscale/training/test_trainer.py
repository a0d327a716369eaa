"""The loop: what a step does and in which order, when something is due, and what a logged line says."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from vitscale.base.errors import StopRequested
from vitscale.evaluation.classification import Scores
from vitscale.planning.resolution import Phase
from vitscale.training import bad_images, clock, trainer
from vitscale.training.bad_images import TooManyBadImages
from vitscale.training.checkpoint import TrainState
from vitscale.training.guard import RollBack
from vitscale.training.objective import Loss
from vitscale.training.steering import Order
from vitscale.training.trainer import Plan, due, train

PLAN = Plan(
    total_steps=4,
    global_batch=12,
    log_every_steps=1,
    eval_every_steps=2,
    save_every_steps=3,
    bad_images_max=0.25,
    seed=5,
    phases=(Phase(first_step=0, image_size=8, flops_per_image=1e9, recomputed_flops_per_image=0.5e9),),
    peak_flops=None,
)
REPORTED_MORE = 0.25  # the reported loss of a micro-batch is its number and this, the trained one its number
SCORES = Scores(images=5, top1=0.5, top5=1.0, loss=0.25)


@dataclass
class Bad:
    position: int


@dataclass
class Batch:
    number: int
    bad: frozenset[int] = frozenset()

    @property
    def images_BHWC(self) -> Tensor:
        return torch.full((1, 1, 1, 1), self.number)

    @property
    def labels_BM(self) -> Tensor:
        return torch.tensor([[self.number]])

    @property
    def samples_hash(self) -> int:
        return (1 << 64) - 10 + self.number

    @property
    def bad_images(self) -> list[Bad]:
        return [Bad(self.number)] if self.number in self.bad else []


class World:
    """Fakes of engine, objective, stream, metrics, evaluation and save that write down what is done with them."""

    def __init__(
        self, *, accumulation: int = 2, skipped_steps: tuple[int, ...] = (), ranks: int = 1, bad: tuple[int, ...] = ()
    ) -> None:
        self.acts: list[Any] = []
        self.seeds: list[tuple[int, int, int]] = []
        self.slots: list[tuple[int, int]] = []
        self.lines: list[dict[str, Any]] = []
        self.saved: list[TrainState] = []
        self.waits: list[int] = []
        """How many acts came before each wait for the saver."""
        self.rank, self.world = 0, ranks
        self.accumulation_steps = accumulation
        self.last_step_skipped = False
        self.skipped_steps = skipped_steps
        self.micro_batches = 0
        self.bad = frozenset(bad)
        self.events: list[dict[str, Any]] = []

    # engine
    def train(self) -> None:
        self.acts.append("train mode")

    def set_lr(self, lr: float) -> None:
        self.acts.append(("lr", lr))

    def seed_micro_batch(self, seed: int, step: int, micro_batch: int) -> None:
        self.seeds.append((seed, step, micro_batch))

    device = torch.device("cpu")

    def time_collectives(self, clock: Any) -> None:
        pass

    def memory_bytes(self) -> int:
        return 1 << 20

    def backward_and_maybe_step(self, loss: Tensor, passed: Any) -> None:
        self.micro_batches += 1
        passed("backward")
        self.acts.append(("backward", loss.item()))
        if self.micro_batches % self.accumulation_steps == 0:
            self.last_step_skipped = self.micro_batches // self.accumulation_steps in self.skipped_steps

    def grad_norm(self) -> float:
        return 7.0

    def sum_over_ranks(self, values: list[float]) -> list[float]:
        return [self.world * value for value in values]

    def sum_modulo_2_64(self, value: int) -> int:
        assert 0 <= value < 1 << 64
        return value

    # objective
    def __call__(self, forward: Any, images_BHWC: Tensor, labels_BM: Tensor, *, step: int, first_slot: int) -> Loss:
        assert forward is self, "the objective must get the engine itself, never its module"
        number = images_BHWC.flatten()[0].item()
        assert labels_BM.tolist() == [[number]]
        self.acts.append(("forward", number))
        self.slots.append((step, first_slot))
        return Loss(torch.tensor(float(number), requires_grad=True), torch.tensor(float(number) + REPORTED_MORE))

    # stream
    def stream(self) -> Iterator[Batch]:
        for number in range(100):
            self.acts.append(("batch", number))
            yield Batch(number, self.bad)

    # metrics
    def log_step(self, line: dict[str, Any]) -> None:
        self.acts.append(("log", line["step"]))
        self.lines.append(line)

    def log_events(self, events: list[dict[str, Any]]) -> None:
        self.acts.append(("events", len(events)))
        self.events += events

    def log_eval(self, step: int, scores: dict[str, float]) -> None:
        self.acts.append(("log eval", step, scores["top1"]))

    def evaluate(self) -> Scores:
        self.acts.append("evaluate")
        return SCORES

    def is_due(self, step: int) -> bool:
        return False

    def poll(self) -> None:
        pass

    def wait(self, *, required: bool = False) -> None:
        assert required
        self.waits.append(len(self.acts))

    def begin(self, state: TrainState) -> None:
        self.acts.append(("save", state.step))
        self.saved.append(replace(state))


def run(
    world: World,
    state: TrainState | None = None,
    *,
    plan: Plan = PLAN,
    evaluates: bool = True,
    writes: bool = True,
    steering: Any = None,
) -> TrainState:
    state = state or TrainState()
    fake: Any = world
    train(
        state,
        plan=plan,
        engine=fake,
        objective=fake,
        stream=world.stream(),
        lr_at_step=lambda step: step / 10,
        evaluate=world.evaluate if evaluates else None,
        saver=world,
        metrics=fake if writes else None,
        steering=steering,
    )
    return state


def test_the_acts_of_a_run_in_their_order():
    world = World()
    run(world)

    def step(number: int) -> list[Any]:
        micro_batches = [
            act for n in (2 * number, 2 * number + 1) for act in (("batch", n), ("forward", n), ("backward", float(n)))
        ]
        return [("lr", number / 10), *micro_batches, ("log", number + 1)]

    evaluation = ["evaluate", "train mode"]  # the engine is back in training before the next step
    assert world.acts == [
        "train mode",
        *step(0),
        *step(1),
        *evaluation,
        ("log eval", 2, 0.5),
        *step(2),
        ("save", 3),
        *step(3),
        *evaluation,
        ("log eval", 4, 0.5),
        ("save", 4),
    ]


def test_state_moves_at_the_end_of_each_step_and_the_save_sees_it():
    world = World()
    end = run(world)
    assert world.saved == [
        TrainState(step=3, position=36, images_seen=36),
        TrainState(step=4, position=48, images_seen=48),
    ]
    assert end == world.saved[-1]


def test_a_skipped_step_is_a_step_and_is_counted():
    world = World(skipped_steps=(2, 3))
    end = run(world)
    assert end == TrainState(step=4, position=48, images_seen=48, skipped=2)
    assert [line["skipped"] for line in world.lines] == [0, 1, 2, 2]
    assert [act[1] for act in world.acts if act[0] == "lr"] == [0.0, 0.1, 0.2, 0.3]


def test_a_resumed_run_makes_the_steps_that_are_left():
    world = World()
    end = run(world, TrainState(step=2, position=1024, images_seen=24, skipped=1, segments=[{"from": 24, "to": 1024}]))
    assert end == TrainState(step=4, position=1048, images_seen=48, skipped=1, segments=[{"from": 24, "to": 1024}])
    assert [act[1] for act in world.acts if act[0] == "lr"] == [0.2, 0.3]


def test_a_finished_run_has_nothing_to_do():
    world = World()
    run(world, TrainState(step=4, position=48, images_seen=48))
    assert world.acts == ["train mode"]


def test_other_ranks_do_the_same_work_and_write_nothing():
    writing, silent = World(), World()
    run(writing)
    run(silent, writes=False)
    assert silent.acts == [act for act in writing.acts if act[0] not in ("log", "log eval")]


def test_without_evaluation_data_nothing_is_evaluated():
    world = World()
    run(world, evaluates=False)
    assert "evaluate" not in world.acts
    assert [s.step for s in world.saved] == [3, 4]


@pytest.mark.parametrize(
    ("every", "total", "steps"),
    [(1, 4, [1, 2, 3, 4]), (2, 4, [2, 4]), (3, 4, [3, 4]), (4, 4, [4]), (9, 4, [4]), (0, 4, [4]), (2, 5, [2, 4, 5])],
)
def test_due_every_so_many_steps_and_after_the_last(every, total, steps):
    assert [step for step in range(1, total + 1) if due(step, every, total)] == steps


def test_a_line_tells_what_the_step_measured(monkeypatch):
    now_s, parts_s = iter(range(100)), iter(range(0, 1000, 10))  # every look at a clock takes one second, or ten
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: float(next(now_s)), time=lambda: 1234.5))
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: float(next(parts_s))))
    world = World(ranks=3)
    run(world, plan=replace(PLAN, total_steps=1, peak_flops=2e9))
    assert world.lines == [
        {
            "step": 1,
            "images_seen": 12,
            "loss": 0.75,  # the reported one: mean of the two micro-batches, mean over the ranks
            "lr": 0.0,
            "grad_norm": 7.0,
            "images_per_s": 12 / 5,
            "image_size": 8,
            "mfu": (12 / 5) * 1e9 / (3 * 2e9),  # all images of the step over the peak of all devices
            "hfu": (12 / 5) * 1.5e9 / (3 * 2e9),  # with what is computed again
            "data_wait_s": 2.0,  # one second for each of two micro-batches
            "step_s": 5.0,
            "forward_s": 20.0,
            "backward_s": 20.0,
            "optimizer_s": 0.0,
            "communication_s": 0.0,
            "memory_bytes": 1 << 20,
            "samples_hash": f"{(1 << 64) - 19:016x}",  # (-10) + (-9) modulo 2^64
            "skipped": 0,
            "bad_images": 0,
            "at_unix_s": 1234.5,
        }
    ]


def test_every_micro_batch_is_seeded_by_where_it_stands():
    world = World()
    run(world)
    assert world.seeds == [(PLAN.seed, step, micro_batch) for step in range(4) for micro_batch in range(2)]


def test_the_objective_is_told_the_slot_of_the_first_image():
    for rank, expected in ((0, [0, 3]), (1, [6, 9])):  # 12 slots on two ranks with two micro-batches each
        world = World(ranks=2)
        world.rank = rank
        run(world, writes=False)
        assert world.slots == [(step, slot) for step in range(4) for slot in expected]


@pytest.mark.parametrize(
    ("point", "done"),
    [
        ("data.batch:micro_batch=1", [("batch", 2), ("forward", 2), ("backward", 2.0)]),
        ("step.forward:micro_batch=1", [("batch", 2), ("forward", 2), ("backward", 2.0), ("batch", 3)]),
        ("step.loss:micro_batch=1", [("batch", 2), ("forward", 2), ("backward", 2.0), ("batch", 3), ("forward", 3)]),
        ("step.backward:micro_batch=1", [("batch", 2), ("forward", 2), ("backward", 2.0), ("batch", 3), ("forward", 3)]),
        ("step.optimizer:micro_batch=0", [("batch", 2), ("forward", 2)]),  # the fake writes its backward down behind it
        ("step.weights", [("batch", 2), ("forward", 2), ("backward", 2.0), ("batch", 3), ("forward", 3), ("backward", 3.0)]),
        (
            "evaluate.begin",
            [("batch", 2), ("forward", 2), ("backward", 2.0), ("batch", 3), ("forward", 3), ("backward", 3.0), ("log", 2)],
        ),
    ],
)
def test_a_fault_point_lies_where_it_says(monkeypatch, point, done):
    monkeypatch.setenv("VITSCALE_FAULT", f"raise@{point}:step=2:rank=0")
    world = World()
    with pytest.raises(RuntimeError, match=point.partition(":")[0]):
        run(world)
    assert world.acts[world.acts.index(("lr", 0.1)) + 1 :] == done


def test_a_nan_on_purpose_is_trained_on_and_reported(monkeypatch):
    monkeypatch.setenv("VITSCALE_FAULT", "nan@step.loss:step=2:micro_batch=0")
    world = World()
    run(world)
    assert [math.isnan(line["loss"]) for line in world.lines] == [False, True, False, False]
    assert [math.isnan(act[1]) for act in world.acts if act[0] == "backward"] == [False, False, True, *[False] * 5]


def test_mfu_is_null_where_the_peak_is_unknown():
    world = World()
    run(world)
    assert [line["mfu"] for line in world.lines] == [None] * 4


def test_each_line_is_of_its_own_step_and_no_mean_over_several():
    world = World()
    run(world, plan=replace(PLAN, log_every_steps=2))
    assert [(line["step"], line["loss"]) for line in world.lines] == [(2, 2.75), (4, 6.75)]


def test_a_kill_at_the_end_of_a_step_comes_before_anything_is_written(monkeypatch):
    monkeypatch.setenv("VITSCALE_FAULT", "raise@step.end:rank=0:step=3")
    world = World()
    with pytest.raises(RuntimeError, match=r"step\.end"):
        run(world)
    assert [line["step"] for line in world.lines] == [1, 2]
    assert world.saved == []


# ---- orders from outside --------------------------------------------------------------------------------------------


class Orders:
    """Steering by a table of orders, that writes down what it is asked and told."""

    def __init__(self, world: World, **orders: Order) -> None:
        self.world, self.orders = world, {int(step.removeprefix("at")): order for step, order in orders.items()}

    def __enter__(self) -> None:
        self.world.acts.append("heard from now on")

    def __exit__(self, *error: object) -> None:
        self.world.acts.append("not heard any more")

    def agree(self, step: int) -> Order:
        return self.orders.get(step, Order())

    def obey(self, order: Order, step: int, metrics: Any) -> None:
        if order != Order():
            self.world.acts.append(("obeyed", step, metrics is not None))
        if order.stop:
            raise StopRequested(order.stop)


def test_a_stop_saves_the_step_that_has_ended_and_begins_no_other():
    world = World()
    with pytest.raises(StopRequested, match="because of a test"):
        run(world, steering=Orders(world, at1=Order(stop="of a test")))
    assert world.saved == [TrainState(step=1, position=12, images_seen=12)]
    assert world.acts[0:2] == ["train mode", "heard from now on"]
    assert world.acts[-4:] == [("log", 1), ("save", 1), ("obeyed", 1, True), "not heard any more"]
    assert world.waits == [len(world.acts) - 2], "it is on the disk before anybody is told that it is saved"


def test_a_stop_at_a_saved_step_saves_nothing_twice_and_comes_after_the_evaluation():
    world = World()
    plan = replace(PLAN, save_every_steps=2)
    with pytest.raises(StopRequested):
        run(world, plan=plan, steering=Orders(world, at2=Order(stop="of a test")), writes=False)
    assert [act for act in world.acts[-5:] if act != "train mode"] == [
        "evaluate",
        ("save", 2),
        ("obeyed", 2, False),
        "not heard any more",
    ]


def test_an_order_to_save_changes_nothing_but_that_it_is_saved():
    asked, quiet = World(), World()
    run(asked, steering=Orders(asked, at1=Order(save=True), at3=Order(save=True, keep=True)))
    run(quiet)
    assert [state.step for state in asked.saved] == [1, 3, 4]
    assert asked.lines[0]["loss"] == quiet.lines[0]["loss"] and asked.saved[1:] == quiet.saved
    assert [act[1] for act in asked.acts if act[0] == "obeyed"] == [1, 3]
    assert asked.waits == [len(asked.acts) - 1], "training does not wait, but the last save is waited for before a signal kills"


def test_bad_images_are_settled_before_an_ordered_save(told_by_all):
    world = World(bad=(1,), ranks=2)
    plan = replace(PLAN, log_every_steps=4, bad_images_max=1.0)
    with pytest.raises(StopRequested):
        run(world, plan=plan, steering=Orders(world, at1=Order(stop="of a test")))
    assert [state.bad_images for state in world.saved] == [2]


# ---- bad images -----------------------------------------------------------------------------------------------------


@pytest.fixture
def told_by_all(monkeypatch):
    """Two ranks: the other one was told of the same images, at positions 100 higher."""

    def gather(events: list[dict[str, Any]]) -> list[Any]:
        return [[{**event, "position": 100 + event["position"]} for event in events], events]

    monkeypatch.setattr(bad_images, "from_all_ranks", gather)


def test_bad_images_of_all_ranks_are_counted_and_told_with_the_step_they_belong_to(told_by_all):
    world = World(ranks=2, bad=(0, 1, 5))
    end = run(world, plan=replace(PLAN, bad_images_max=1.0))
    assert [line["bad_images"] for line in world.lines] == [4, 4, 6, 6] and end.bad_images == 6
    told = [(event["step"], event["event"], event["position"]) for event in world.events]
    assert told == [(step, "bad_image", position) for step, position in [(1, 0), (1, 1), (1, 100), (1, 101), (3, 5), (3, 105)]]


def test_steps_that_are_not_logged_lose_no_bad_image_and_no_checkpoint_knows_of_an_untold_one(told_by_all):
    world = World(ranks=2, bad=(0, 3, 5, 6))
    run(world, plan=replace(PLAN, log_every_steps=0, bad_images_max=1.0))
    assert [event["step"] for event in world.events] == [1, 1, 2, 2, 3, 3, 4, 4]
    written = [act for act in world.acts if act[0] in ("events", "save", "log")]
    assert written == [("events", 6), ("save", 3), ("events", 2), ("log", 4), ("save", 4)]
    assert [state.bad_images for state in world.saved] == [6, 8]


def test_a_resumed_run_counts_on(told_by_all):
    world = World(ranks=2, bad=(0,))
    assert run(world, TrainState(step=2, position=24, images_seen=24, bad_images=5)).bad_images == 7


def test_without_bad_images_nothing_is_gathered():
    assert run(World(ranks=2)).bad_images == 0  # gathering would need a process group


# (bad micro-batches, share, step at which the run stops): 12 images a step, each bad micro-batch counts twice.
BUDGETS = [
    ((0,), 0.0, 1),
    ((3,), 0.0, 2),
    (range(5), 0.01, None),  # ten are always allowed
    (range(6), 0.01, 3),
    (range(6), 0.4, None),  # 12 of 36
    (range(6), 0.3, 3),
]


@pytest.mark.parametrize(("bad", "share", "stops_at"), BUDGETS)
@pytest.mark.parametrize("writes", [True, False])
def test_past_the_budget_every_rank_stops_at_the_same_step(told_by_all, bad, share, stops_at, writes):
    world = World(ranks=2, bad=tuple(bad))
    plan = replace(PLAN, bad_images_max=share)
    if stops_at is None:
        run(world, plan=plan, writes=writes)
        return
    state = TrainState()
    with pytest.raises(TooManyBadImages, match=r"of \d+ images were bad after step .* events\.jsonl") as caught:
        run(world, state, plan=plan, writes=writes)
    assert state.step == stops_at and caught.value.exit_code == 78 and not caught.value.every_rank_speaks
    if writes:  # the last line says why
        assert world.lines[-1]["bad_images"] == len(world.events) == state.bad_images


def test_a_budget_is_noticed_within_fifty_steps_when_nothing_is_logged(told_by_all):
    world = World(ranks=2, accumulation=1, bad=tuple(range(20)))
    state = TrainState()
    plan = replace(PLAN, total_steps=90, log_every_steps=0, eval_every_steps=0, save_every_steps=0, bad_images_max=0.01)
    with pytest.raises(TooManyBadImages):
        run(world, state, plan=plan)
    assert state.step == 50


class Numbers:
    """A guard and a check of replicas that write down when they are asked, and go back after a step."""

    def __init__(self, world: World, *, back_after: int = 0) -> None:
        self.world, self.back_after = world, back_after

    def screened(self, loss: Loss, step: int) -> Tensor:
        self.world.acts.append(("screened", step))
        return loss.trained * 2

    def check(self, step: int) -> None:
        self.world.acts.append(("replicas", step))

    def settle(self, state: TrainState, metrics: Any) -> None:
        self.world.acts.append(("settled", state.step, state.position, state.skipped))
        if state.step == self.back_after:
            raise RollBack(state)


def test_numbers_are_screened_in_every_micro_batch_and_settled_before_anything_is_written():
    world = World(skipped_steps=(2,))
    numbers, fake = Numbers(world, back_after=3), cast(Any, world)
    with pytest.raises(RollBack) as caught:
        train(
            TrainState(),
            plan=PLAN,
            engine=fake,
            objective=fake,
            stream=world.stream(),
            lr_at_step=float,
            evaluate=None,
            saver=world,
            metrics=fake,
            guard=numbers,
            check_replicas=numbers.check,
        )
    assert caught.value.state.step == 3 and world.saved == [] and [line["step"] for line in world.lines] == [1, 2]
    middle = world.acts.index(("lr", 1.0))
    assert world.acts[middle:] == [
        ("lr", 1.0),
        ("batch", 2),
        ("forward", 2),
        ("screened", 2),
        ("backward", 4.0),
        ("batch", 3),
        ("forward", 3),
        ("screened", 2),
        ("replicas", 2),
        ("backward", 6.0),
        ("settled", 2, 24, 1),
        ("log", 2),
        ("lr", 2.0),
        ("batch", 4),
        ("forward", 4),
        ("screened", 3),
        ("backward", 8.0),
        ("batch", 5),
        ("forward", 5),
        ("screened", 3),
        ("replicas", 3),
        ("backward", 10.0),
        ("settled", 3, 36, 1),
    ]
