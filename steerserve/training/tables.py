"""Texts to harvest out of tables, by pyarrow alone: Parquet files, and datasets that HF saved to disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..sae.files import inside, read_json
from .corpus import Corpus, Text

__all__ = ["open_tables"]

_ROWS_AT_ONCE = 256
_READ_AHEAD = 2**20
_FILE_FORMAT = b"ARROW1"

# Rows of one file: (column of some rows, share of the file that has been read with them).
_Columns = Callable[[Path, str], Iterator[tuple[Any, float]]]


def open_tables(path: Path, field: str) -> Corpus:
    """The column `field` of a .parquet or .arrow file, or of all tables of a folder, in the order of names.

    Raises: ConfigError naming the file that is missing, damaged, or has no such column of strings.
    """
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise ConfigError(f"expected pyarrow to read {path} (install steerserve[train])") from None
    files = _files(path)
    for file in files:
        # A typo in the column's name should not wait for an engine to start.
        next(_checked(file, field), None)
    sizes = [file.stat().st_size for file in files]
    return Corpus(sum(sizes), lambda: _texts(files, sizes, field))


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        if not path.is_file():
            raise ConfigError(f"expected a file of texts, found none at {path}")
        return [path]
    if (splits := path / "dataset_dict.json").is_file():
        names = read_json(splits).get("splits")
        raise ConfigError(f"expected one split of the dataset in {path}: the folder of one of {names}")
    if (path / "dataset_info.json").is_file():
        return _saved(path)
    if not (found := sorted(path.rglob("*.parquet"))):
        raise ConfigError(
            f"expected Parquet files or a dataset saved by `save_to_disk`, found none in {path}"
        )
    return found


def _saved(folder: Path) -> list[Path]:
    """The Arrow files of `datasets.save_to_disk`, in the order in which its state lists them."""
    entries = read_json(inside(folder, "state.json")).get("_data_files")
    names = [entry.get("filename") for entry in entries or [] if isinstance(entry, dict)]
    if not names or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"expected `_data_files` with file names in {folder / 'state.json'}, got {entries}")
    return [inside(folder, str(name)) for name in names]


def _texts(files: list[Path], sizes: list[int], field: str) -> Iterator[Text]:
    before = 0
    for file, size in zip(files, sizes, strict=True):
        row = 0
        for column, share in _checked(file, field):
            for cell in column:
                row += 1
                text = _text_of(cell, field, file, row)
                if text.strip():
                    yield Text(text, before + int(size * share))
        before += size


def _text_of(cell: Any, field: str, file: Path, row: int) -> str:
    try:
        text = cell.as_py()
    except UnicodeDecodeError as error:
        raise ConfigError(f"expected UTF-8: {error} - at row {row} of {file}") from None
    if not isinstance(text, str):
        raise ConfigError(f"expected a string `{field}`, got {text!r} - at row {row} of {file}")
    return text


def _checked(file: Path, field: str) -> Iterator[tuple[Any, float]]:
    """The column's pieces; what pyarrow says of a damaged file becomes an error that names it."""
    import pyarrow as pa

    read: _Columns = _parquet if file.suffix == ".parquet" else _arrow
    try:
        yield from read(file, field)
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"expected a whole {file.suffix[1:]} file: {error} - in {file}") from None


def _parquet(file: Path, field: str) -> Iterator[tuple[Any, float]]:
    import pyarrow.parquet as pq

    # Pages come in as they are needed: a row group may be larger than the memory that is left.
    with pq.ParquetFile(file, buffer_size=_READ_AHEAD, pre_buffer=False) as table:
        _check_column(table.schema_arrow, field, file)
        done, rows = 0, max(1, table.metadata.num_rows)
        for batch in table.iter_batches(_ROWS_AT_ONCE, columns=[field], use_threads=False):
            done += batch.num_rows
            yield batch.column(0), done / rows


def _arrow(file: Path, field: str) -> Iterator[tuple[Any, float]]:
    import pyarrow as pa

    with pa.OSFile(str(file), "rb") as source:
        is_file = source.read(len(_FILE_FORMAT)) == _FILE_FORMAT
        source.seek(0)
        reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
        _check_column(reader.schema, field, file)
        if is_file:
            count = reader.num_record_batches
            for number in range(count):
                yield reader.get_batch(number).column(field), (number + 1) / count
        else:
            for batch in reader:
                yield batch.column(field), source.tell() / source.size()


def _check_column(schema: Any, field: str, file: Path) -> None:
    import pyarrow as pa

    if field not in schema.names:
        raise ConfigError(f"expected a column `{field}`, got {schema.names} - in {file}")
    kind = schema.field(field).type
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not any(test(plain) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_null)):
        raise ConfigError(f"expected strings in the column `{field}`, got {kind} - in {file}")
