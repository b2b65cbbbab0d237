"""Rows of a data set's files, read by ``datasets`` without decoding a picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from vlmtune.errors import HubError
from vlmtune.hub.messages import first_line


def rows_of(
    name: str,
    source: str,
    subset: str | None,
    split: str | None,
    *,
    trusted: tuple[str, ...],
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """Rows of what ``datasets`` finds at ``source`` (a hub name or a folder).

    Pictures that a row only names are read where they lie in ``trusted``: folders and hub paths.
    """
    import datasets

    wanted = split or "train"
    streaming = bool(options.pop("streaming", False))
    try:
        builder = datasets.load_dataset_builder(source, subset, **options)
        splits = sorted(str(found) for found in builder.config.data_files or ())
        if splits and wanted not in splits:
            raise HubError(
                f"The data set {name} has no split {wanted!r}; it has: {', '.join(splits)}. "
                "Choose one with --split."
            )
        if streaming:
            rows = builder.as_streaming_dataset(split=wanted)
        else:
            builder.download_and_prepare()
            rows = builder.as_dataset(split=wanted).to_iterable_dataset()
    except (datasets.exceptions.DatasetsError, ValueError, RuntimeError) as error:
        # An unknown subset, a loading script (never run), a damaged table: its first line says it.
        raise HubError(f"The data set {name} cannot be read: {first_line(error)}") from error
    return (_with_bytes(row, trusted) for row in rows.decode(False))


def _with_bytes(value: Any, trusted: tuple[str, ...]) -> Any:
    """Fills in pictures that a row only names.

    A table could name any file of this computer, so only paths inside the data set are followed;
    of any other path the last part is left, as a label.
    """
    if isinstance(value, list):
        return [_with_bytes(item, trusted) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() != {"bytes", "path"}:
        return {key: _with_bytes(item, trusted) for key, item in value.items()}
    content, path = value["bytes"], value["path"]
    if content is None and path is not None and _inside(path, trusted):
        import fsspec

        with fsspec.open(path, "rb") as file:
            content = file.read()
    return {"bytes": content, "path": PurePosixPath(path).name if path else None}


def _inside(path: str, trusted: tuple[str, ...]) -> bool:
    if path.startswith("hf://"):
        return ".." not in path and path.startswith(trusted)
    folders = [Path(root).resolve() for root in trusted if not root.startswith("hf://")]
    return any(Path(path).resolve().is_relative_to(folder) for folder in folders)
