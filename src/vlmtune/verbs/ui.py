"""``ui``: a chat page in the browser."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from pathlib import Path

from vlmtune.data.media import ImagePolicy
from vlmtune.errors import MissingExtraError, UsageError
from vlmtune.models.load import LoadingConfig
from vlmtune.runs.resolve import Resolved, resolve
from vlmtune.serving.engine import Engine
from vlmtune.serving.limits import Limits
from vlmtune.serving.served import Served, default_name, open_served
from vlmtune.serving.settings import MAX_NEW_TOKENS, EngineConfig

logger = logging.getLogger(__name__)

PASSWORD_BYTES = 9  # of one that is made up: 72 bits
UPLOADS = "uploads"  # Gradio removes old files below its folder; those of the examples stay
EXAMPLES = "examples"


def ui(  # noqa: PLR0913
    model: str | Path,
    *,
    folder: Path,
    compare: str | Path | None = None,
    data: str | Path | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    password_file: str | Path | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    image: ImagePolicy | None = None,
    base: str | None = None,
    loading: LoadingConfig | None = None,
    limits: Limits | None = None,
    ready: Callable[[str, str | None], None] | None = None,
) -> None:
    """Show the page until a signal says to end.

    Args:
        model: Hub id, local model, run, checkpoint or adapter.
        folder: An empty folder for pictures; who made it removes it. Gradio's own folder, which it
            takes from ``GRADIO_TEMP_DIR``, is to be ``uploads`` below it.
        compare: Another model that answers every question beside it. The base of an adapter takes
            no further memory.
        data: A prepared data set whose rows are offered as examples.
        host: Address to listen on; 0.0.0.0 is everywhere, and then a password is asked for.
        port: Port; 0 takes any that is free.
        password_file: A file whose first line is the password. Without one, a page that other
            machines reach makes up its own.
        max_new_tokens: Longest answer unless the visitor says.
        image: Image policy of a plain model; what was trained keeps its contract.
        base: Where an adapter's base is now, if it moved.
        loading: Device, dtype, quantization.
        limits: How much a conversation may hold.
        ready: Called with the URL, and the password if it was made up, once the page answers.

    Raises:
        MissingExtraError: If Gradio is not installed.
        UsageError: If the port is taken, or the file of the password holds none.
    """
    try:
        from vlmtune.serving.server import check_port, is_loopback, run
        from vlmtune.serving.webui.app import create_app, make_page_server
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "gradio", "ui", "vlmtune ui") from None
    from vlmtune.serving.webui.asking import Panel, Side
    from vlmtune.serving.webui.examples import read_examples
    from vlmtune.serving.webui.page import Page
    from vlmtune.serving.webui.pictures import Pictures

    limits = limits or Limits()
    password = None if password_file is None else read_password(Path(password_file))
    made_up = password is None and not is_loopback(host)
    if made_up:
        password = secrets.token_urlsafe(PASSWORD_BYTES)
    check_port(host, port)
    opened = open_sides(model, compare, image=image, base=base, loading=loading)
    engines = [Engine(served, EngineConfig(max_new_tokens=max_new_tokens)) for served in opened]
    try:
        for engine in engines:
            engine.start()
        sides = [
            Side(each.name, engine, each)
            for engine in engines
            for each in engine.served.models.values()
        ]
        policy = sides[0].model.encoder.contract.image
        pictures = Pictures(folder / UPLOADS, policy)
        panel = Panel(sides, pictures)
        kept = Pictures(folder / EXAMPLES, policy)
        examples = [] if data is None else read_examples(data, kept)
        page = Page(panel, pictures, examples, limits, max_new_tokens)
        local_only = is_loopback(host) and password is None
        app = create_app(page, folder, password=password, local_only=local_only, limits=limits)
        told = ready or _silent
        shown = password if made_up else None
        run(make_page_server(app, host, port, limits, lambda url: told(url, shown)))
    finally:
        for engine in engines:
            engine.stop()


def open_sides(
    model: str | Path,
    compare: str | Path | None,
    *,
    image: ImagePolicy | None = None,
    base: str | None = None,
    loading: LoadingConfig | None = None,
) -> list[Served]:
    """The models of the page: together where they stand on the same weights, else each by itself.

    A plain model that is compared sees pictures as the first one does, and is asked the same.

    Raises:
        UsageError: If there is nothing of the kind to compare with.
    """
    if compare is None:
        return [open_served(model, image=image, base=base, loading=loading)]
    first, own = resolve(model, base=base), default_name(model)
    if _is_word_base(compare):
        if first.adapter is None:
            raise UsageError(
                f"--compare base: {model} is no adapter, so that nothing says which model is its "
                "base; give the base's folder or hub id"
            )
        name = f"{own} (base)"
        return [open_served(model, base_name=name, image=image, base=base, loading=loading)]
    second, name = resolve(compare), default_name(compare)
    name = f"{name} (2)" if name == own else name
    if _same_weights(first, second):
        if second.adapter is not None:
            adapters = {name: compare}
            return [open_served(model, adapters=adapters, image=image, base=base, loading=loading)]
        if first.adapter is not None:
            return [open_served(model, base_name=name, image=image, base=base, loading=loading)]
    served = open_served(model, image=image, base=base, loading=loading)
    policy = served.first.encoder.contract.image
    return [served, open_served(compare, name=name, image=policy, loading=loading)]


def read_password(path: Path) -> str:
    """The first line of a file.

    Raises:
        UsageError: If it cannot be read, or is empty.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--password-file: {path} cannot be read: {error}") from None
    if not lines or not lines[0].strip():
        raise UsageError(f"--password-file: {path} is empty; expected a password in its first line")
    if path.stat().st_mode & 0o077:
        logger.warning("--password-file: others on this machine may read %s; chmod 600", path)
    return lines[0].strip()


def _is_word_base(compare: str | Path) -> bool:
    return compare == "base" and not Path(compare).is_dir()


def _same_weights(first: Resolved, second: Resolved) -> bool:
    """Whether one copy of the weights does for both."""
    if first.adapter is None and second.adapter is None:
        return False
    ours, theirs = first.base.identity(), second.base.identity()
    return ours.weights_sha256 == theirs.weights_sha256


def _silent(_url: str, _password: str | None) -> None:
    pass
