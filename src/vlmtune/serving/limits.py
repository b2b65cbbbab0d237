"""How much one request may bring: counted while it is read, before anything is decoded."""

from __future__ import annotations

from pydantic import Field

from vlmtune.config import Config

MIB = 2**20
MAX_SOURCE_PIXELS = 40_000_000  # a photograph of the largest kind; 120 MB decoded


class Limits(Config):
    """What the API takes.

    Attributes:
        max_body_bytes: Largest request.
        max_pending_bytes: Most bytes of all requests that are being read or made ready.
        max_delimiters: Most brackets and commas of a request: each may become a Python object.
        max_messages: Most turns.
        max_characters: Most characters of all texts together.
        max_images: Most images.
        max_image_bytes: Largest image file.
        header_seconds: Longest time for sending a request's headers.
        body_seconds: Longest time for sending its body.
        fetch_seconds: Longest time for fetching one image.
        max_connections: Most connections at once; further ones are closed.
        drain_seconds: How long running answers may go on when the server is told to end.
    """

    max_body_bytes: int = Field(default=32 * MIB, ge=1024)
    max_pending_bytes: int = Field(default=512 * MIB, ge=1024)
    max_delimiters: int = Field(default=250_000, ge=1)
    max_messages: int = Field(default=256, ge=1)
    max_characters: int = Field(default=1_000_000, ge=1)
    max_images: int = Field(default=16, ge=0)
    max_image_bytes: int = Field(default=20 * MIB, ge=1)
    header_seconds: float = Field(default=15.0, gt=0)
    body_seconds: float = Field(default=60.0, gt=0)
    fetch_seconds: float = Field(default=10.0, gt=0)
    max_connections: int = Field(default=512, ge=1)
    drain_seconds: float = Field(default=30.0, ge=0)
