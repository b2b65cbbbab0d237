"""The options of ``prepare``, and of the data in a recipe that consists of parts."""

from __future__ import annotations

import re
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from vlmtune.config import Config


class PrepareOptions(Config):
    """The options of ``vlmtune prepare``.

    Attributes:
        format: A name in ``FORMATS``, or auto.
        prompt: Text put behind the image of rows that ask no question themselves.
        columns: Which column is for what, e.g. ``{"image": "scan", "text": "latex"}``.
        validation: Rows of the validation split: a count, or a fraction below 1.
        split_by: ``last`` rows of the source or ``random`` ones, rows that share an image's bytes
            always together; ``column:NAME``: as that column says.
        max_bad: Most rows that may be quarantined: a fraction below 1, or a count.
        limit: Only the first so many rows of the source.
        images_root: A folder that images may be in, tried first for relative paths.
        seed: Draws the validation rows (``random``) and the trained one of several answers.
        answer_separator: What separates several answers in one text, e.g. ``&&``.
        hub: Where ``owner/name`` is looked up.
        split: The split to take from a hub's data set.
        subset: The subset (configuration) to take from a hub's data set.
        revision: The revision to take from a hub's data set.
        allow_urls: Open ``http:`` and ``https:`` URLs of images, on the public internet only.
        workers: Processes that read and decode; 1: this one alone, None: one a core, at most 4.
            The dataset's bytes do not depend on it.
    """

    format: str = "auto"
    prompt: str | None = None
    columns: dict[str, str] = Field(default_factory=dict)
    validation: int | float = Field(default=0, ge=0)
    split_by: str = "last"
    max_bad: float = Field(default=0.01, ge=0)
    limit: int | None = Field(default=None, gt=0)
    images_root: str | None = None
    seed: int = 0
    answer_separator: str | None = Field(default=None, min_length=1)
    hub: Literal["huggingface", "modelscope"] = "huggingface"
    split: str | None = None
    subset: str | None = None
    revision: str | None = None
    allow_urls: bool = False
    workers: int | None = Field(default=None, ge=1, le=256)

    @field_validator("split_by")
    @classmethod
    def _is_a_way_to_split(cls, value: str) -> str:
        if value not in ("last", "random") and not re.fullmatch("column:.+", value):
            raise ValueError(f"{value!r} is no way to split; expected last, random or column:NAME")
        return value

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.split_column and self.validation:
            raise ValueError(
                f"split_by {self.split_by} says which rows are validation, so that validation = "
                f"{self.validation} has no meaning; give one of them"
            )
        if self.validation >= 1 and self.validation != int(self.validation):
            raise ValueError(f"validation {self.validation} is neither a count nor a fraction")
        return self

    @property
    def split_column(self) -> str | None:
        """The column that names a row's split, if one does."""
        prefix, _, name = self.split_by.partition(":")
        return name if prefix == "column" else None

    def recorded(self) -> dict[str, Any]:
        """What decides the dataset's bytes, for ``dataset.json``."""
        return self.model_dump(mode="json", exclude={"workers"})


class DataSource(Config):
    """One of the recipe's ``data.sources``.

    Attributes:
        path: A prepared dataset.
        weight: How often each of its train rows comes in an epoch, on average.
    """

    path: str
    weight: float = Field(default=1.0, gt=0, le=1000)
