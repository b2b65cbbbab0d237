"""The page as an application with its gate, and the server that runs it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import gradio as gr
import uvicorn
from fastapi import FastAPI

from vlmtune.serving.limits import Limits
from vlmtune.serving.server import Impatient, Ready, Server
from vlmtune.serving.webui.gate import Gate
from vlmtune.serving.webui.page import Page
from vlmtune.serving.webui.style import CSS, FONT, MONOSPACE

if TYPE_CHECKING:
    from starlette.types import ASGIApp

END_SECONDS = 2  # browsers hold a connection open as long as the page is


def create_app(
    page: Page, folder: Path, *, password: str | None, local_only: bool, limits: Limits
) -> ASGIApp:
    """The ASGI application.

    Args:
        page: The page.
        folder: Where its pictures lie, which browsers may fetch.
        password: What visitors have to know; None asks for nothing.
        local_only: Whether to answer only requests that name this machine as their host.
        limits: How large an upload may be.
    """
    theme = gr.themes.Soft(primary_hue="indigo", font=FONT, font_mono=MONOSPACE)
    app = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page.build(),
        path="/",
        footer_links=[],
        run_history=False,
        allowed_paths=[str(folder)],
        max_file_size=limits.max_image_bytes,
        show_error=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
        theme=theme,
        css=CSS,
    )
    return Gate(
        app,
        password=password,
        local_only=local_only,
        folder=folder,
        max_body_bytes=limits.max_body_bytes,
    )


def make_page_server(app: ASGIApp, host: str, port: int, limits: Limits, ready: Ready) -> Server:
    """A server that is not running yet; arguments as of ``make_server``."""
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=type("Impatient", (Impatient,), {"limits": limits}),
        ws="none",
        lifespan="on",  # Gradio starts its queue there
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=END_SECONDS,
    )
    return Server(config, ready)
