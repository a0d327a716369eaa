"""The file of --labels: which source class gets which name, and through the names which label.

Lines `source_class,name` (or with a tab between); labels count the names in the order in which they first appear, so the
file alone decides the number of a class, in a training and in an evaluation set alike. Several source classes may have
one name. A source class without a line is left out.
"""

import csv
from pathlib import Path

import numpy as np

from vitscale.base.errors import EnvironmentFault, UsageError, nearest

HEADER = ["source_class", "name"]


def read_label_map(path: Path) -> dict[str, str]:
    """Name of each source class, in the order of the file. Raises UsageError naming the first line that is wrong."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise EnvironmentFault(f"--labels: {path} cannot be read ({error.strerror}); name another file") from None
    except UnicodeDecodeError:
        raise UsageError(f"--labels: expected {path} in UTF-8; save it so") from None
    name_of: dict[str, str] = {}
    lines = text.splitlines()
    delimiter = "\t" if lines and "\t" in lines[0] else ","
    for number, fields in enumerate(csv.reader(lines, delimiter=delimiter, skipinitialspace=True), start=1):
        if not fields or (number == 1 and fields == HEADER):
            continue
        if len(fields) != 2 or not all(field.strip() for field in fields):
            line = delimiter.join(fields)
            raise UsageError(f"--labels: {path}, line {number}: expected two fields, source class and name, got {line!r}")
        source_class, name = (field.strip() for field in fields)
        if name_of.setdefault(source_class, name) != name:
            names = f"{name_of[source_class]!r} and {name!r}"
            raise UsageError(f"--labels: {path}, line {number}: the class {source_class!r} has two names, {names}; keep one")
    if not name_of:
        raise UsageError(f"--labels: expected lines source_class,name in {path}, found none")
    return name_of


def mapped_classes(source_classes: tuple[str, ...], name_of: dict[str, str]) -> tuple[tuple[str, ...], np.ndarray]:
    """The names as classes, and int32 class of each source class (-1: left out; the last entry serves label -1).

    Names of which the source has no class stay: the numbers must not follow from what a source happens to hold.
    """
    classes = tuple(dict.fromkeys(name_of.values()))
    label_of = {name: label for label, name in enumerate(classes)}
    number_of = np.full(len(source_classes) + 1, -1, np.int32)
    for number, source_class in enumerate(source_classes):
        if source_class in name_of:
            number_of[number] = label_of[name_of[source_class]]
    if (number_of < 0).all():
        first = next(iter(name_of))
        raise UsageError(
            f"--labels: none of its {len(name_of)} source classes, such as {first!r}, is among the {len(source_classes)} "
            f"classes of the source{nearest(first, source_classes)}"
        )
    return classes, number_of
