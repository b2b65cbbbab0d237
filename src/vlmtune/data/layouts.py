"""Files and folders that become rows only when something is joined: COCO, folders of classes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

IMAGE_ENDINGS = (
    *(".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif"),
)
# Folders of this name divide a data set; they are no classes.
SPLIT_FOLDERS = frozenset({"train", "training", "validation", "valid", "val", "dev", "test"})
ANNOTATION_KEYS = ("id", "image_id", "caption", "bbox", "iscrowd", "category_id")


def rows_of_document(document: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Rows of a JSON file whose top level is an object, where it is COCO's; None: it is not.

    A row an image, with its ``annotations`` and their ``category`` by name (segmentations are left
    out). Annotations of images that are not listed come last, a row an image too: none is lost.
    """
    images, annotations = _objects(document, "images"), _objects(document, "annotations")
    if images is None or annotations is None:
        return None
    categories = _objects(document, "categories") or []
    names = {_key(category.get("id")): category.get("name") for category in categories}
    rows = [{**image, "annotations": []} for image in images]
    by_image: dict[str, dict[str, Any]] = {}
    for row in rows:
        by_image.setdefault(_key(row.get("id")), row)
    for annotation in annotations:
        kept = {key: annotation[key] for key in ANNOTATION_KEYS if key in annotation}
        if "category_id" in kept:
            kept["category"] = names.get(_key(kept["category_id"]))
        image = annotation.get("image_id")
        if _key(image) not in by_image:
            rows.append({"image_id": image, "annotations": []})
            by_image[_key(image)] = rows[-1]
        by_image[_key(image)]["annotations"].append(kept)
    return rows


def _objects(document: Mapping[str, Any], key: str) -> list[dict[str, Any]] | None:
    value = document.get(key)
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        return value
    return None


def _key(value: Any) -> str:
    """An id as a key: hashable whatever stands there, and 1 is not "1"."""
    return repr(value)


def rows_of_classes(folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of a folder without a table whose images lie in a folder for each class.

    ``cat/1.png`` is ``{"file_name": "cat/1.png", "label": "cat"}``; ``train/cat/1.png`` has its
    ``split`` too. Nothing comes of a folder with fewer than two classes: it was not sorted so.
    """
    inside = (path for path in _files_below(folder, PurePath()) if len(path.parts) > 1)
    classes = {path.parent.name for path in inside if path.suffix.lower() in IMAGE_ENDINGS}
    if len(classes) < 2 or classes <= SPLIT_FOLDERS:
        return
    for path in _files_below(folder, PurePath()):
        if len(path.parts) == 1:
            continue
        row = {"file_name": path.as_posix(), "label": path.parent.name}
        if len(path.parts) > 2 and path.parts[0].lower() in SPLIT_FOLDERS:
            row["split"] = path.parts[0]
        yield row


def _files_below(folder: Path, inside: PurePath) -> Iterator[PurePath]:
    """The files in ``folder / inside`` and below, relative to ``folder``, by name.

    Hidden ones and folders that are links are left out. One folder's names are in memory at once.
    """
    with os.scandir(folder / inside) as entries:
        names = sorted(
            (entry.name, entry.is_dir(follow_symlinks=False))
            for entry in entries
            if not entry.name.startswith(".")
            and (entry.is_dir(follow_symlinks=False) or not entry.is_dir())
        )
    for name, is_folder in names:
        if is_folder:
            yield from _files_below(folder, inside / name)
        else:
            yield inside / name
