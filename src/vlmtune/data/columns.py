"""Python values as Arrow columns, without asking pandas.

``pyarrow.array`` imports pandas, where it is installed, to see whether a list is one of its own
columns: as long as reading some hundred rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, chain
from typing import Any

import numpy as np
import pyarrow as pa


def batch_of(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.RecordBatch:
    """Rows as a batch; a key that is missing is null.

    Args:
        rows: With values of text, bytes, truth, numbers, and lists and mappings of such.
        schema: Of the batch.
    """
    columns = [array_of([row.get(field.name) for row in rows], field.type) for field in schema]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def array_of(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """What ``pyarrow.array`` makes of them.

    Args:
        values: Of one kind, None where there is none.
        kind: Text, bytes, truth, a number, or a list or struct of such.
    """
    count, valid = len(values), _bits(value is not None for value in values)
    if pa.types.is_struct(kind):
        rows = [{} if value is None else value for value in values]
        fields = [array_of([row.get(field.name) for row in rows], field.type) for field in kind]
        return pa.Array.from_buffers(kind, count, [valid], children=fields)
    if pa.types.is_list(kind):
        rows = [() if value is None else value for value in values]
        items = array_of(list(chain.from_iterable(rows)), kind.value_type)
        return pa.Array.from_buffers(kind, count, [valid, _offsets(rows)], children=[items])
    if pa.types.is_string(kind) or pa.types.is_binary(kind):
        texts = [_bytes(value) for value in values]
        return pa.Array.from_buffers(
            kind, count, [valid, _offsets(texts), pa.py_buffer(b"".join(texts))]
        )
    if pa.types.is_boolean(kind):
        return pa.Array.from_buffers(kind, count, [valid, _bits(values)])
    numbers = np.array([0 if value is None else value for value in values], kind.to_pandas_dtype())
    return pa.Array.from_buffers(kind, count, [valid, pa.py_buffer(numbers)])


def _bytes(value: str | bytes | None) -> bytes:
    if value is None:
        return b""
    return value.encode() if isinstance(value, str) else value


def _bits(values: Any) -> pa.Buffer:
    return pa.py_buffer(np.packbits(np.array(list(values), bool), bitorder="little"))


def _offsets(rows: Sequence[Sequence[Any]]) -> pa.Buffer:
    """Where each begins and the last ends."""
    return pa.py_buffer(np.array([0, *accumulate(map(len, rows))], np.int32))
