"""Documents out of tables: Parquet and Arrow by pyarrow, CSV by the standard library."""

import csv
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from outside_in.data.prepare.compression import require
from outside_in.data.prepare.formats import suffix_of
from outside_in.data.prepare.rows import Bad, Document, ReadOptions, listed

ROWS = 256  # of a table, in memory at a time
MAX_CHARACTERS = 2**28  # of a value


def csv_rows(name: str, lines: Iterator[Document], reading: ReadOptions) -> Iterator[Document]:
    """Yield one column of comma-separated values, or tab-separated ones, below a line of names."""
    csv.field_size_limit(MAX_CHARACTERS)
    dialect = csv.excel_tab if suffix_of(name) == ".tsv" else csv.excel
    rows = csv.reader(_all_good(lines), dialect, strict=True)
    try:
        names = next(rows, [])
        if reading.field not in names:
            raise ValueError(f"{name}: no column {reading.field!r}; --field takes one of {listed(names)}")
        column = names.index(reading.field)
        for i, row in enumerate(rows, start=1):
            if len(row) == len(names):
                yield row[column]
            elif row:
                yield Bad(f"{name}: row {i:,}: expected {len(names)} values, got {len(row)}")
    except csv.Error as error:
        raise ValueError(f"{name}: line {rows.line_num:,}: expected CSV, got other text ({error})") from None


def _all_good(lines: Iterator[Document]) -> Iterator[str]:
    for line in lines:
        if isinstance(line, Bad):  # without it the rest means something else
            raise ValueError(line.reason)  # noqa: TRY004
        yield line


def parquet_rows(name: str, content: BinaryIO, reading: ReadOptions) -> Iterator[Document]:
    """Yield one column of a Parquet table."""
    require("pyarrow")
    from pyarrow import parquet  # an optional package

    def batches() -> Iterator[Any]:
        table = parquet.ParquetFile(content)
        _check_column(table.schema_arrow, reading.field, name)
        yield from table.iter_batches(ROWS, columns=[reading.field])

    return _documents(name, batches, "Parquet", reading)


def arrow_rows(name: str, content: BinaryIO, reading: ReadOptions) -> Iterator[Document]:
    """Yield one column of an Arrow table: a file, or a stream as the library `datasets` writes it."""
    require("pyarrow")
    from pyarrow import ipc  # an optional package

    def batches() -> Iterator[Any]:
        is_file = content.read(6) == b"ARROW1"
        content.seek(0)
        table: Any = ipc.open_file(content) if is_file else ipc.open_stream(content)
        _check_column(table.schema, reading.field, name)
        for batch in map(table.get_batch, range(table.num_record_batches)) if is_file else table:
            yield from (batch.slice(start, ROWS) for start in range(0, batch.num_rows, ROWS))

    return _documents(name, batches, "Arrow", reading)


def _documents(name: str, batches: Callable[[], Iterator[Any]], kind: str, reading: ReadOptions) -> Iterator[Document]:
    import pyarrow  # an optional package

    count = 0
    try:
        for batch in batches():
            for value in _values(batch, reading.field):
                count += 1
                yield _decoded(value, f"{name}: row {count:,}", reading)
    except pyarrow.ArrowException as error:
        reason = " ".join(str(error).split())[:200]
        if count:
            raise ValueError(f"{name}: damaged after row {count:,} ({reason}); fetch it again") from None
        raise ValueError(f"{name}: not a readable {kind} file ({reason}); fetch it again") from None


def _decoded(value: Any, where: str, reading: ReadOptions) -> Document:
    if not isinstance(value, bytes):
        return Bad(f"{where}: expected text in {reading.field!r}, got {type(value).__name__}")
    try:
        return value.decode("utf-8", reading.errors)
    except UnicodeDecodeError as error:
        byte = f"byte {error.start:,} of it is 0x{value[error.start]:02x}"
        return Bad(f"{where}: expected UTF-8 text, but {byte}; use --errors replace")


def _check_column(schema: Any, field: str, name: str) -> None:
    """Raise ValueError unless a table has a column, perhaps in another one: `meta.text`."""
    import pyarrow  # an optional package

    fields = pyarrow.struct(schema)
    for part in [field] if field in schema.names else field.split("."):
        if not pyarrow.types.is_struct(fields) or fields.get_field_index(part) < 0:
            raise ValueError(f"{name}: no column {field!r}; --field takes one of {listed(_columns(schema))}")
        fields = fields.field(part).type


def _columns(schema: Any) -> Iterator[str]:
    for field in schema:
        inner = [f"{field.name}.{each.name}" for each in field.flatten()] if field.type.num_fields else [field.name]
        yield from inner


def _values(batch: Any, field: str) -> list[Any]:
    """Return the values of a column, text as bytes: so one that is not UTF-8 does not keep others from being read."""
    import pyarrow  # an optional package
    from pyarrow import compute, types

    if field in batch.schema.names:
        column = batch.column(field)
    else:
        first, *rest = field.split(".")
        column = compute.call_function("struct_field", [batch.column(first)], compute.StructFieldOptions(rest))
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if types.is_string(column.type) or types.is_large_string(column.type) or types.is_string_view(column.type):
        column = column.cast(pyarrow.large_binary())
    return column.to_pylist()
