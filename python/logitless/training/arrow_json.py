"""JSON text in Arrow columns of the type `arrow.json`, as `datasets` writes values of no one shape to Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any


def decoded_json(value: Any, kind: Any) -> Any:
    """The value of a column, with what its JSON texts say in place of them, at any depth.

    Args:
        value: as pyarrow makes it Python's.
        kind: the column's pyarrow type.

    Raises:
        ValueError: a text that is no JSON.
    """
    if value is None or not _holds_json(kind):
        return value
    if _is_json(kind):
        return json.loads(value)
    if isinstance(value, list):
        (item,) = _children(kind)
        return [decoded_json(each, item.type) for each in value]
    return {field.name: decoded_json(value[field.name], field.type) for field in _children(kind)}


def _is_json(kind: Any) -> bool:
    return getattr(kind, "extension_name", None) == "arrow.json"


def _holds_json(kind: Any) -> bool:
    return _is_json(kind) or any(_holds_json(field.type) for field in _children(kind))


def _children(kind: Any) -> Iterator[Any]:
    """The fields of a struct, or the one of a list; none of any other type."""
    from pyarrow import types

    if types.is_struct(kind) or types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        yield from (kind.field(index) for index in range(kind.num_fields))
