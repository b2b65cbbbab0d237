"""``serve``: an OpenAI-compatible API."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vlmtune.data.media import ImagePolicy
from vlmtune.errors import MissingExtraError, UsageError
from vlmtune.models.load import LoadingConfig
from vlmtune.models.products import keep_few_kernels
from vlmtune.serving.engine import Engine
from vlmtune.serving.front import Front
from vlmtune.serving.limits import Limits
from vlmtune.serving.served import open_served
from vlmtune.serving.settings import EngineConfig
from vlmtune.serving.vllm.process import VllmConfig

logger = logging.getLogger(__name__)


def serve(  # noqa: PLR0913
    model: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    api_key_file: str | Path | None = None,
    allow_domains: Sequence[str] = (),
    cors_origins: Sequence[str] = (),
    engine: EngineConfig | None = None,
    limits: Limits | None = None,
    image: ImagePolicy | None = None,
    base: str | None = None,
    loading: LoadingConfig | None = None,
    vllm: VllmConfig | None = None,
    ready: Callable[[str, Sequence[str]], None] | None = None,
) -> None:
    """Answer requests until a signal says to end.

    Args:
        model: Hub id, local model, run, checkpoint or adapter.
        host: Address to listen on; 0.0.0.0 is everywhere.
        port: Port; 0 takes any that is free.
        name: What requests call the model; None takes the folder's name or the hub id.
        adapters: Further adapters on the same base, by the name that requests use.
        api_key_file: A file with one key a line, any of which opens the API.
        allow_domains: Hosts whose images are fetched, and those below them; ``*``: any public one.
        cors_origins: Origins of web pages that may ask.
        engine: How many questions are answered at once.
        limits: How much one request may bring.
        image: Image policy of a plain model; what was trained keeps its contract.
        base: Where an adapter's base is now, if it moved.
        loading: Device, dtype, quantization.
        vllm: Let this vLLM compute, in a process and an environment of its own, behind the same
            API; for merged models. None computes here.
        ready: Called with the URL and the names of the models once requests are answered.

    Raises:
        MissingExtraError: If the server's packages are not installed.
        UsageError: If the port is taken, the file of keys holds none, or vLLM is asked for what it
            cannot serve.
        ContractMismatchError: If vLLM would see other tokens or pixels than were trained.
    """
    try:
        from vlmtune.serving.openai_api import ApiConfig, create_app
        from vlmtune.serving.server import check_port, is_loopback, make_server, run
        from vlmtune.serving.vllm.open import open_vllm
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "fastapi", "serve", "vlmtune serve") from None
    keys = () if api_key_file is None else read_keys(Path(api_key_file))
    limits = limits or Limits()
    if not keys and not is_loopback(host):
        logger.warning(
            "--host %s: everybody who reaches this machine can ask; --api-key-file asks for a key",
            host,
        )
    check_port(host, port)
    config = ApiConfig(
        api_keys=keys,
        domains=frozenset(domain.lower().rstrip(".") for domain in allow_domains),
        cors_origins=cors_origins,
        local_only=is_loopback(host) and not keys,
        limits=limits,
    )
    answering: Front
    if vllm is None:
        keep_few_kernels()
        served = open_served(
            model, name=name, adapters=adapters, image=image, base=base, loading=loading
        )
        answering = Engine(served, engine)
    else:
        if adapters or base is not None:
            raise UsageError(
                "--adapter, --base: vLLM serves one merged model; merge each adapter, or serve "
                "them without --engine"
            )
        answering = open_vllm(
            model, vllm, name=name, image=image, loading=loading, engine=engine, limits=limits
        )
    try:
        answering.start()
        told = ready or _silent
        app = create_app(answering, config)
        names = tuple(answering.served.models)
        run(make_server(app, host, port, limits, lambda url: told(url, names)))
    finally:
        answering.stop()


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys of a file, one a line; empty lines and ``#`` lines are left out.

    Raises:
        UsageError: If there is none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--api-key-file: {path} cannot be read: {error}") from None
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys:
        raise UsageError(f"--api-key-file: {path} holds no key; expected one a line")
    if path.stat().st_mode & 0o077:
        logger.warning("--api-key-file: others on this machine may read %s; chmod 600", path)
    return keys


def _silent(_url: str, _models: Sequence[str]) -> None:
    pass
