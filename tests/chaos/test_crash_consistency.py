"""Law 3: a save is recorded call by call, and after a crash at any of them the choice of a start is a whole checkpoint."""

import os
import random
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.helpers import small_engine
from tests.helpers.crash_states import TRACED, Disk, Tree, read_tree
from tests.helpers.ranks import run_ranks
from tests.helpers.saves import TINY, save
from tests.helpers.strace import Call, attached, calls_of, require_strace, texts_of
from vitscale.base.cluster import Cluster
from vitscale.base.errors import EnvironmentFault
from vitscale.training.checkpoint import candidates, has_rejected, newest_valid

pytestmark = pytest.mark.slow

OLDEST, PREVIOUS, NEW = "step-00000001", "step-00000002", "step-00000003"
STAGES = (2, 3)


class Recording(NamedTuple):
    """One save of step 3, which lets retention delete everything before it."""

    root: Path
    before: Tree
    calls: list[Call]
    after: Tree


def record(cluster: Cluster, place: Path) -> None:
    """At each stage: two saves, then one under strace that keeps nothing else."""
    for stage in STAGES:
        config, ds = small_engine.settings(stage, cluster.world, *TINY)
        engine = small_engine.make(config, ds)
        root = place / str(stage) / "checkpoints"
        for step in (1, 2):
            small_engine.train(engine, config, range(step - 1, step))
            save(engine, root, step=step)
        if cluster.rank == 0:
            shutil.copytree(root, place / str(stage) / "before")
            (place / str(stage) / "calls").mkdir()
        small_engine.train(engine, config, range(2, 3))  # all ranks meet here, so the directories are there
        output = place / str(stage) / "calls" / f"rank{cluster.rank}"
        options = ("-ff", "-y", "-xx", "-s", "1000000", "--absolute-timestamps=format:unix,precision:ns", "-o", str(output))
        with attached(*options, "-e", f"trace={TRACED}"):
            small_engine.train(engine, config, range(3, 4))  # nobody starts before all are watched
            save(engine, root, step=3, keep_last=1)
        engine.close()


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    require_strace()
    place = tmp_path_factory.mktemp("recorded")
    run_ranks(2, record, place)
    return {
        stage: Recording(
            root=place / str(stage) / "checkpoints",
            before=read_tree(place / str(stage) / "before"),
            calls=calls_of(place / str(stage) / "calls"),
            after=read_tree(place / str(stage) / "checkpoints"),
        )
        for stage in STAGES
    }


class Chooser:
    """What a start would choose in a tree; equal trees are looked at once."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._blobs: dict[bytes, Path] = {}
        self._known: dict[tuple, str] = {}

    @property
    def distinct(self) -> int:
        return len(self._known)

    def choice(self, tree: Tree) -> str:
        """Name of the directory, "refused", or "a fresh start"."""
        key = tuple(sorted((path, content if content is None else hash(content)) for path, content in tree.items()))
        if key not in self._known:
            root = self._place / f"tree{len(self._known)}"
            root.mkdir(parents=True)
            for path, content in tree.items():
                if content is None:
                    (root / path).mkdir()
                else:
                    (root / path).hardlink_to(self._blob(content))
            try:
                self._known[key] = newest_valid(root)[0].name
            except EnvironmentFault:
                self._known[key] = "refused" if candidates(root) or has_rejected(root) else "a fresh start"
            shutil.rmtree(root)
        return self._known[key]

    def _blob(self, content: bytes) -> Path:
        if content not in self._blobs:
            self._blobs[content] = self._place / f"blob{len(self._blobs)}"
            self._blobs[content].parent.mkdir(exist_ok=True)
            self._blobs[content].write_bytes(content)
        return self._blobs[content]


def of_step(tree: Tree, name: str) -> Tree:
    """The recorded files of a step directory, notes and temporary files left out."""
    return {path: content for path, content in tree.items() if path.startswith(f"{name}/") and f"{name}/." not in path}


class Verdict(NamedTuple):
    states: int
    distinct: int
    wrong: list[str]


def replay(recording: Recording, place: Path, calls: list[Call], *, only_at_end: bool = False) -> Verdict:
    """Crash after every call, or after the last, and judge what a start would choose in every state that may be left."""
    disk, chooser, generator = Disk(recording.root, recording.before), Chooser(place), random.Random(0)
    states, wrong, is_committed, is_sure = 0, [], False, False
    for number, call in enumerate(calls):
        if not disk.apply(call) and number < len(calls) - 1:
            continue
        is_committed = is_committed or NEW in disk.now[0]
        is_sure = is_sure or NEW in disk.flushed[0]
        if only_at_end and number < len(calls) - 1:
            continue
        for tree in disk.states(generator):
            states += 1
            choice = chooser.choice(tree)
            expected = [NEW] if is_sure else [PREVIOUS, NEW] if is_committed else [PREVIOUS]
            whole = recording.after if choice == NEW else recording.before
            is_right = choice in expected and of_step(tree, choice) == of_step(whole, choice)
            if not is_right:
                wrong.append(f"after call {number} ({call.name}): {choice}, expected {' or '.join(expected)}")
    assert is_sure, "the rename was never flushed"
    end = disk.tree(disk.pending, {})
    assert {path: content for path, content in end.items() if path.startswith("step-")} == {
        path: content for path, content in recording.after.items() if path.startswith("step-")
    }, "the recorded calls do not explain what is there"
    return Verdict(states, chooser.distinct, wrong)


@pytest.mark.parametrize("stage", STAGES)
def test_after_a_crash_at_any_call_the_choice_is_a_whole_checkpoint(recordings, tmp_path, stage):
    verdict = replay(recordings[stage], tmp_path, recordings[stage].calls)
    print(f"stage {stage}: {verdict.states} states, {verdict.distinct} distinct, {len(verdict.wrong)} choices wrong")
    assert verdict.wrong == []
    assert verdict.states >= 1000


@pytest.mark.parametrize("what", ["files", "the new directory", "checkpoints"])
def test_a_commit_that_forgets_a_flush_is_found_out(recordings, tmp_path, what):
    """The same calls without some of the flushes: the save has returned, and what it saved may be gone, or all of it."""
    recording = recordings[2]

    def is_left_out(call: Call) -> bool:
        path = Path(os.fsdecode((texts_of(call.arguments) or [b""])[0]))
        kind = "checkpoints" if path == recording.root else "the new directory" if path.suffix == ".partial" else "files"
        return call.name == "fsync" and kind == what

    calls = [call for call in recording.calls if not is_left_out(call)]
    assert 2 <= len(recording.calls) - len(calls) <= 12
    if what == "checkpoints":
        with pytest.raises(AssertionError, match="the rename was never flushed"):
            replay(recording, tmp_path, calls, only_at_end=True)
    else:
        assert any("refused" in sentence for sentence in replay(recording, tmp_path, calls, only_at_end=True).wrong)
