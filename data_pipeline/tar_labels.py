"""The labels beside an image in a tar: `KEY.cls` (a number or a class name), else `KEY.json`.

KEY.json holds a number, a name, a list of them, or an object with one of these as `labels`, `label` or `cls`; an object
without any of the three is metadata and says nothing of labels. This program writes `{"labels": [3, 17]}`.
"""

import json
from collections.abc import Collection, Mapping

LABEL_ENDINGS = ("cls", "json")
"""Where labels are looked for; the first that is there counts."""
LABEL_BYTES_MAX = 16 << 20
MOST_CLASSES = 1_000_000
"""A label becomes an index into a list of names; more than this is an identifier, not a class."""

_FIELDS = ("labels", "label", "cls")


class BadLabel(Exception):
    """The label of an image makes no sense; the text says why."""


def label_ending(endings: Collection[str]) -> str | None:
    """The member of a sample that holds its labels, if there is one."""
    return next((ending for ending in LABEL_ENDINGS if ending in endings), None)


def marks_in(content: bytes, *, ending: str) -> list[int | str]:
    """Labels as they are written, numbers or names, in their order; empty: none. Raises BadLabel."""
    try:
        text = content.decode("utf-8").strip("\0 \t\r\n")
        found = json.loads(text) if ending == "json" else _plain(text)
    except (ValueError, RecursionError):
        raise BadLabel(f"expected text in .{ending}, got {content[:40]!r}") from None
    if isinstance(found, dict):
        found = next((found[name] for name in _FIELDS if name in found), None)
    marks = [] if found is None else found if isinstance(found, list) else [found]
    for mark in marks:
        if isinstance(mark, bool) or not isinstance(mark, int | str):
            raise BadLabel(f"expected numbers or names as labels, got {str(mark)[:40]!r} in .{ending}")
    return marks


def labels_of(marks: list[int | str], *, number_of: Mapping[str, int]) -> list[int]:
    """Numbers of classes, each once; -1 and empty names say nothing. `number_of`: class names; empty: unknown, any number.

    Raises BadLabel for a name or number that is not among the classes.
    """
    below = len(number_of) or MOST_CLASSES
    labels: dict[int, None] = {}
    for mark in marks:
        number = mark if isinstance(mark, int) else number_of.get(mark)
        if number is None:
            known = f"the {len(number_of):,} class names" if number_of else "numbers (names need --classes)"
            raise BadLabel(f"expected a label among {known}, got {str(mark)[:40]!r}")
        if not -1 <= number < below:
            raise BadLabel(f"expected a label below {below:,}, got {number}")
        if number >= 0:
            labels[number] = None
    return list(labels)


def _plain(text: str) -> int | str | None:
    if not text:
        return None
    return int(text) if text.removeprefix("-").isdecimal() and text.isascii() else text
