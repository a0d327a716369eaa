"""Law 3: of a thousand damaged checkpoints none is loaded; the one before is, and the damaged file is named."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.helpers.ranks import run_ranks
from tests.helpers.saves import STAGES, linked, real_checkpoints
from vitscale.base.cluster import Cluster
from vitscale.base.errors import EnvironmentFault
from vitscale.training.checkpoint import RECORD, candidates, find_checkpoint, has_rejected, newest_valid, verify

pytestmark = pytest.mark.slow

PREVIOUS, NEWEST, LATER = "step-00000002", "step-00000004", "step-00000006"


class Mutant(NamedTuple):
    """One way to damage a `checkpoints` directory that holds PREVIOUS and NEWEST."""

    what: str
    harm: Callable[[Path], None]
    chosen: str = PREVIOUS
    refused: str | None = NEWEST
    """The candidate that must not pass."""
    named: str | None = None
    """File that the complaint about it begins with."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return real_checkpoints(tmp_path_factory.mktemp("saved"))


# ---- the mutants ------------------------------------------------------------------------------------------------------


def put(path: Path, content: bytes) -> None:
    """Replace a file that may share its bytes with other trees."""
    path.unlink()
    path.write_bytes(content)


def flipped(content: bytes, byte: int, bit: int) -> bytes:
    return content[:byte] + bytes([content[byte] ^ 1 << bit]) + content[byte + 1 :]


def damaged_contents(content: bytes) -> Iterator[tuple[str, bytes]]:
    size = len(content)
    yield "empty", b""
    for percent in (25, 50, 99):
        yield f"cut to {percent} %", content[: size * percent // 100]
    yield "cut by a byte", content[:-1]
    yield "a byte too long", content + b"\0"
    yield "written twice", content * 2
    yield "all zeros", bytes(size)
    middle = size // 2 // 512 * 512
    yield "a sector of zeros", content[:middle] + bytes(len(content[middle : middle + 512])) + content[middle + 512 :]
    for number in range(8):
        place = (size - 1) * number // 7
        yield f"bit {number} of byte {place} flipped", flipped(content, place, number)


def of_one_file(newest: Path, name: str) -> Iterator[Mutant]:
    """Every damage of one file, alone and by others of its kind."""
    content = (newest / name).read_bytes()
    path = Path(NEWEST) / name

    def mutant(what: str, harm: Callable[[Path], Any]) -> Mutant:
        return Mutant(f"{name}: {what}", harm, named=name)

    yield mutant("absent", lambda tree: (tree / path).unlink())
    yield mutant("a directory", lambda tree: ((tree / path).unlink(), (tree / path).mkdir()))
    yield mutant("a dead link", lambda tree: ((tree / path).unlink(), (tree / path).symlink_to("nowhere")))
    yield mutant("a link to itself", lambda tree: ((tree / path).unlink(), (tree / path).symlink_to(name)))
    yield mutant("a pipe", lambda tree: ((tree / path).unlink(), os.mkfifo(tree / path)))
    yield mutant("under another name", lambda tree: (tree / path).rename(tree / NEWEST / "renamed"))
    for what, wrong in damaged_contents(content):
        if wrong != content:
            yield mutant(what, lambda tree, wrong=wrong: put(tree / path, wrong))
    sources = [newest.parent / PREVIOUS / name, *(file for file in newest.iterdir() if file.suffix == path.suffix)]
    for source in sources:
        other = source.read_bytes()
        if other != content:
            what = f"{source.name} of {source.parent.name} in its place"
            yield mutant(what, lambda tree, other=other: put(tree / path, other))


def of_the_record(newest: Path) -> Iterator[Mutant]:
    """Every value of the record changed, one at a time, under its old seal."""
    record = json.loads((newest / RECORD).read_text())

    def edits(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
        if isinstance(value, dict | list):
            for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                yield from edits(inner, (*path, key))
        elif isinstance(value, bool) or value is None:
            yield path, 7
        else:
            yield path, value + 1 if isinstance(value, int | float) else value + "x"

    def changed(path: tuple[Any, ...], value: Any) -> bytes:
        copy = json.loads(json.dumps(record))
        inner = copy
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        return json.dumps(copy).encode()

    for path, value in edits(record, ()):
        wrong = changed(path, value)
        what = f"{RECORD}: {'.'.join(map(str, path))} is {value!r}"
        yield Mutant(what, lambda tree, wrong=wrong: put(tree / NEWEST / RECORD, wrong), named=RECORD)
    shorter, longer = {**record, "files": record["files"][1:]}, {**record, "files": [*record["files"], record["files"][0]]}
    for what, copy in {"one file less": shorter, "one file twice": longer, "another key": record | {"more": 1}}.items():
        wrong = json.dumps(copy).encode()
        yield Mutant(f"{RECORD}: {what}", lambda tree, wrong=wrong: put(tree / NEWEST / RECORD, wrong), named=RECORD)


def of_the_tree(newest: Path) -> Iterator[Mutant]:
    """Files that changed places, strangers among them, and directories under wrong names."""
    names = sorted(file.name for file in newest.iterdir())

    def swap(tree: Path, a: str, b: str) -> None:
        one, other = ((newest / name).read_bytes() for name in (a, b))
        put(tree / NEWEST / a, other)
        put(tree / NEWEST / b, one)

    for a, b in combinations(names, 2):
        if (newest / a).read_bytes() == (newest / b).read_bytes():
            continue  # as model files at stage 3 may be, which hold no numbers of a rank
        first = RECORD if RECORD in (a, b) else a  # the record is read first
        yield Mutant(f"{a} and {b} swapped", lambda tree, a=a, b=b: swap(tree, a, b), named=first)
    shard = next(name for name in names if name.endswith(".pt"))
    for stranger in (
        "mp_rank_01_model_states.pt",
        "zero_pp_rank_7_mp_rank_00_model_states.pt",
        "zero_pp_rank_7_mp_rank_00_optim_states.pt",
        "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "partition-00007.json",
        "ema-00007.safetensors",
    ):
        harm = lambda tree, stranger=stranger: shutil.copy(newest / shard, tree / NEWEST / stranger)  # noqa: E731
        yield Mutant(f"{stranger} too many", harm, named=stranger)

    def under_other_name(old: str, new: str) -> Callable[[Path], Any]:
        return lambda tree: (tree / old).rename(tree / new)

    yield Mutant(f"{NEWEST} called {LATER}", under_other_name(NEWEST, LATER), refused=LATER, named=RECORD)
    yield Mutant(f"{PREVIOUS} called {LATER}", under_other_name(PREVIOUS, LATER), NEWEST, LATER, RECORD)
    yield Mutant(f"{NEWEST} not yet committed", under_other_name(NEWEST, f"{NEWEST}.partial"), refused=None)
    yield Mutant(f"{NEWEST} put aside", under_other_name(NEWEST, f"{NEWEST}.bad-1"), refused=None)
    yield Mutant("no directory", lambda tree: shutil.rmtree(tree / NEWEST), refused=None)
    yield Mutant("an empty one", lambda tree: (shutil.rmtree(tree / NEWEST), (tree / NEWEST).mkdir()), named=RECORD)
    yield Mutant("a file", lambda tree: (shutil.rmtree(tree / NEWEST), (tree / NEWEST).write_text("")), named=RECORD)
    yield Mutant("a dead link", lambda tree: (shutil.rmtree(tree / NEWEST), (tree / NEWEST).symlink_to("no")), named=RECORD)
    previous_in_its_place = lambda tree: (shutil.rmtree(tree / NEWEST), linked(tree / PREVIOUS, tree / NEWEST))  # noqa: E731
    yield Mutant("the previous one in its place", previous_in_its_place, named=RECORD)
    nested = lambda tree: (tree / NEWEST).rename(tree / "x").rename((tree / NEWEST).mkdir() or tree / NEWEST / NEWEST)  # noqa: E731
    yield Mutant("one directory too deep", nested, named=RECORD)
    for what, text in {"empty": "", "of another step": PREVIOUS, "of no step": "step-99999999", "garbage": "\0\xff"}.items():
        harm = lambda tree, text=text: put(tree / "latest", text.encode())  # noqa: E731
        yield Mutant(f"latest: {what}", harm, NEWEST, refused=None)
    yield Mutant("latest: absent", lambda tree: (tree / "latest").unlink(), NEWEST, refused=None)


def mutants_of(checkpoints: Path) -> Iterator[Mutant]:
    newest = checkpoints / NEWEST
    for file in sorted(newest.iterdir()):
        yield from of_one_file(newest, file.name)
    yield from of_the_record(newest)
    yield from of_the_tree(newest)


# ---- the laws ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_no_mutant_is_loaded_and_the_damaged_file_is_named(saved, tmp_path, stage):
    assert newest_valid(saved[stage])[0].name == NEWEST
    wrong, count = [], 0
    for mutant in mutants_of(saved[stage]):
        count += 1
        tree = linked(saved[stage], tmp_path / "checkpoints")
        mutant.harm(tree)
        path, record = newest_valid(tree)
        complaint = verify(tree / mutant.refused)[0] if mutant.refused else None
        is_named = complaint is None if mutant.refused is None else str(complaint).startswith(mutant.named or "?")
        if path.name != mutant.chosen or record["state"]["step"] != int(path.name[-8:]) or not is_named:
            wrong.append(f"{mutant.what}: {path.name}, {complaint}")
        shutil.rmtree(tree)
    print(f"stage {stage}: {count} mutants, {len(wrong)} of them wrong")
    assert wrong == [] and count >= 180


@pytest.mark.parametrize("stage", STAGES)
def test_with_both_damaged_no_start_is_a_fresh_one(saved, tmp_path, stage):
    """Every damage of every file, of both checkpoints at once."""
    count = 0
    for file in sorted((saved[stage] / NEWEST).iterdir()):
        contents = [dict(damaged_contents((saved[stage] / step / file.name).read_bytes())) for step in (PREVIOUS, NEWEST)]
        for what in contents[0].keys() & contents[1].keys():
            tree = linked(saved[stage], tmp_path / "checkpoints")
            for step, wrong in zip((PREVIOUS, NEWEST), contents, strict=True):
                put(tree / step / file.name, wrong[what])
            with pytest.raises(EnvironmentFault, match=rf"{NEWEST}: {file.name}.*; {PREVIOUS}: {file.name}"):
                newest_valid(tree)
            assert candidates(tree), "an empty list would be a fresh start"
            shutil.rmtree(tree)
            count += 1
    assert count > 40


def starts(cluster: Cluster, trees: dict[str, Path]) -> dict[str, tuple[str | None, list[str]]]:
    """What a start of several ranks finds in each tree, and what is said about it."""
    found: dict[str, tuple[str | None, list[str]]] = {}
    for name, tree in trees.items():
        said: list[str] = []
        try:
            saved = find_checkpoint(tree, say=said.append)
            found[name] = (saved.directory.name if saved else None, said)
        except EnvironmentFault as error:
            found[name] = (f"refused: {error}", said)
    return found


def test_all_ranks_choose_the_same_and_put_the_damaged_one_aside(saved, tmp_path):
    """The collective choice, on some mutants of each stage, one with both checkpoints damaged among them."""
    expected, trees = {}, {}
    for stage, checkpoints in saved.items():
        mutants = [mutant for mutant in mutants_of(checkpoints) if mutant.refused == NEWEST and "pipe" not in mutant.what]
        for mutant in mutants[stage :: len(mutants) // 6]:
            name = f"{stage} {mutant.what}".replace("/", "_")
            trees[name] = linked(checkpoints, tmp_path / f"{len(trees)}")
            mutant.harm(trees[name])
            expected[name] = mutant.named
        trees[f"{stage} both"] = linked(checkpoints, tmp_path / f"both{stage}")
        for step in (PREVIOUS, NEWEST):
            (trees[f"{stage} both"] / step / RECORD).unlink()
    first, second = run_ranks(2, starts, trees), run_ranks(2, starts, trees)
    for name, named in expected.items():
        (chosen, said), (chosen_by_other, _) = (found[name] for found in first)
        assert chosen == chosen_by_other == PREVIOUS, name
        assert len(said) == 1 and said[0].startswith(f"checkpoint {NEWEST} is not usable: {named}"), (name, said)
        assert (trees[name] / f"{NEWEST}.bad-1").exists() and has_rejected(trees[name])
        assert [found[name] for found in second] == [(PREVIOUS, [])] * 2
    for stage in saved:
        for found in (*first, *second):
            chosen = found[f"{stage} both"][0]
            assert chosen is not None and chosen.startswith("refused:") and "none is usable" in chosen
