"""Plain JSON values to frozen dataclasses, strictly: every mistake is a sentence with the nearest name or the expected type.

What a field may be: a dataclass (a section), int, float, str, bool, None, Literal of texts, a union, tuple[X, ...].
"""

import dataclasses
import math
import types
import typing
from typing import Any, Literal, TypeVar

from vitscale.base.errors import nearest

T = TypeVar("T")


def decode(cls: type[T], record: Any, path: str = "") -> T:
    """An instance of the dataclass `cls` from a record; `path` is the dotted place of the record in messages.

    Raises ValueError for unknown, missing and ill-typed keys, and what the checks of the dataclass itself raise.
    """
    if not isinstance(record, dict):
        raise ValueError(f"expected a section with keys at {path or 'the top'}, got {record!r}")
    known = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls))}
    for name in record:
        if name not in known:
            wrong, right = _join(path, name), [_join(path, other) for other in known]
            raise ValueError(f"there is no setting {wrong!r}{nearest(wrong, right)}")
    values = {}
    for name, f in known.items():
        if name in record:
            values[name] = _decode_value(f.type, record[name], _join(path, name))
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ValueError(f"the setting {_join(path, name)} is missing")
    return cls(**values)


def _decode_value(expected: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(expected):
        return decode(typing.cast(Any, expected), value, path)
    origin, options = typing.get_origin(expected), typing.get_args(expected)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if origin in (types.UnionType, typing.Union):
        for option in options:
            try:
                return _decode_value(option, value, path)
            except ValueError:
                continue
    elif origin is Literal:
        if isinstance(value, str) and value in options:
            return value
    elif origin is tuple:
        if isinstance(value, list):
            return tuple(_decode_value(options[0], item, path) for item in value)
    elif expected is types.NoneType:
        if value is None:
            return None
    elif expected is float:
        if is_number:
            return float(value)
    elif expected is str:
        # An override cannot tell the text 5 from the number 5.
        if isinstance(value, str) or is_number:
            return str(value)
    elif expected is int:
        if is_number and isinstance(value, int):
            return value
    elif isinstance(value, expected):
        return value
    literals = [option for option in options if isinstance(option, str)]
    raise ValueError(f"{path}: expected {_spell(expected)}, got {value!r}{nearest(str(value), literals)}")


def _spell(expected: Any) -> str:
    origin, options = typing.get_origin(expected), typing.get_args(expected)
    if origin is Literal:
        return ("one of " if len(options) > 1 else "") + ", ".join(map(repr, options))
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_spell(option) for option in options)
    if origin is tuple:
        return f"a list, each item {_spell(options[0])}"
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", types.NoneType: "null"}
    return names.get(expected, str(expected))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
