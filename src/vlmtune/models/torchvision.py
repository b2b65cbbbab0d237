"""Living beside a torchvision that is installed and cannot be imported.

PyPI's torchvision beside a CPU build of torch raises ``operator torchvision::nms does not exist``.
transformers takes what is installed for what works, and then even its Pillow image processors and
its models fail to import. Nothing of ours needs torchvision unless a recipe names its backend.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache
from typing import Any, cast


@cache
def torchvision_fault() -> str | None:
    """Why torchvision cannot be imported; None where it can. The broken one is hidden.

    Call it before the first class of transformers is imported. Hidden is meant as Python means it:
    None in ``sys.modules`` makes a package count as not installed, to transformers too.
    """
    if importlib.util.find_spec("torchvision") is None:
        return "it is not installed"
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # noqa: BLE001  # its operators fail with whatever torch raises
        cast("dict[str, Any]", sys.modules)["torchvision"] = None
        from transformers.utils.import_utils import is_torchvision_available

        # The answer was remembered when transformers itself was imported.
        cast(Any, is_torchvision_available).cache_clear()
        return f"{type(error).__name__}: {error}"
    return None
