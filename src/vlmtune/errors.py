"""One tree of exceptions: every error a user can cause is a ``VlmtuneError``.

A message says what went wrong, what was found, what was expected and what to do next, and names the
option (``training.batch_size``) or the row (``table.csv:17``). The command line prints it as one
paragraph and exits with ``exit_status``; anything that is *not* a ``VlmtuneError`` is our defect.
"""

from __future__ import annotations


class VlmtuneError(Exception):
    """Something the user can mend. Exit status 1."""

    exit_status = 1
    code = "failed"


class UsageError(VlmtuneError):
    """A wrong option, name or combination: nothing was started. Exit status 2."""

    exit_status = 2
    code = "usage"


class RecipeError(UsageError):
    """A recipe with mistakes; the message lists all of them at once."""

    code = "recipe"


class FormatError(UsageError):
    """A source whose form is unknown, ambiguous, or lacks a column that was asked for."""

    code = "format"


class MissingExtraError(UsageError):
    """An optional package is not installed; the message holds the exact ``pip install`` line."""

    code = "missing_extra"

    def __init__(self, package: str, extra: str, needed_for: str) -> None:
        super().__init__(
            f"{needed_for} needs the package {package!r}, which is not installed. "
            f"Install it with: pip install 'vlmtune[{extra}]'"
        )


class RefusedError(VlmtuneError):
    """We could go on, but the result could not be trusted. Exit status 4."""

    exit_status = 4
    code = "refused"


class TooManyBadRowsError(RefusedError):
    """More rows were quarantined than ``--max-bad`` allows."""

    code = "too_many_bad_rows"


class ContractMismatchError(RefusedError):
    """Model, adapter and data do not share one preprocessing contract."""

    code = "contract_mismatch"


class RunExistsError(RefusedError):
    """The run folder already holds a run, or another process works in it."""

    code = "run_exists"


class ChangedError(RefusedError):
    """Data, recipe or contract are not what the run was started with."""

    code = "changed"


class DiskFullError(VlmtuneError):
    """There is no room left to write to. Exit status 1."""

    code = "disk_full"


class DataError(VlmtuneError):
    """Data that cannot be used as it is. ``code`` is stable: quarantine names the fault by it.

    Args:
        code: Stable, machine-readable name of the fault, e.g. ``image_truncated``.
        message: What, found, expected, next step.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class ImageError(DataError):
    """A picture that cannot be opened under the image policy."""


class RowError(DataError):
    """A row that cannot become a conversation."""


class FetchError(VlmtuneError):
    """A URL that may not be opened, or that gave no image.

    Args:
        code: Stable: ``url_not_allowed``, ``url_unreachable``, ``url_timeout``, ``url_too_large``
            or ``url_bad_answer``.
        message: What, found, expected, next step. Holds no credentials.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class HubError(VlmtuneError):
    """A model or data set could not be fetched from its hub."""

    code = "hub"


class ModelError(VlmtuneError):
    """A model folder that cannot be loaded, or a model that does not do what its family says."""

    code = "model"


class CheckpointError(VlmtuneError):
    """A checkpoint is damaged or cannot be written."""

    code = "checkpoint"


class MergeError(VlmtuneError):
    """A merge whose proof failed: nothing was published."""

    code = "merge"


class DivergedError(VlmtuneError):
    """Loss or gradients stopped being finite; the last good checkpoint is intact."""

    code = "diverged"
