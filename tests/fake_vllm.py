"""A stand-in for ``vllm serve``: its interface over the stock classes of transformers.

What vLLM 0.33 takes and tells at ``/inference/v1/generate`` (tokens in, tokens out), ``/health``
and ``/v1/models``, with its own reading of pictures: the folder's image processor, and one image
token unfolded into as many as it sees. Nothing of the package's own encoding or decoding is used.

Run as a program it takes vLLM's command line: ``python fake_vllm.py serve FOLDER --uds SOCKET …``.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import queue
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from PIL import Image

IMAGE_TOKEN = "image_token_id"


class Fake:
    """One model, asked one question at a time.

    Attributes:
        asked: The bodies of all questions.
        left: Questions whose client left before their end.
        fault: What goes wrong: ``disabled``, ``silent``, ``sees more`` or ``breaks``.
    """

    def __init__(self, folder: Path, model: Any = None) -> None:
        from transformers import AutoImageProcessor, AutoModelForImageTextToText

        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.processor = AutoImageProcessor.from_pretrained(folder)
        self.model = model
        if model is None:
            self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        self.asked: list[dict[str, Any]] = []
        self.left = 0
        self.fault = ""
        self.pace = threading.Event()
        self.pace.set()
        self._lock = threading.Lock()

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/health")
        def health() -> JSONResponse:
            return JSONResponse({})

        @app.get("/v1/models")
        def models() -> JSONResponse:
            length = self.model.config.get_text_config().max_position_embeddings
            return JSONResponse({"data": [{"id": "model", "max_model_len": length}]})

        @app.post("/inference/v1/generate")
        async def generate(request: Request) -> Any:
            body = await request.json()
            if self.fault == "disabled":
                message = "Scale-out endpoints are disabled."
                return JSONResponse({"error": {"message": message, "code": 403}}, 403)
            self.asked.append(body)
            return StreamingResponse(self._stream(body), media_type="text/event-stream")

        return app

    async def _stream(self, body: dict[str, Any]) -> AsyncIterator[str]:
        """Server-sent events, as they are spoken."""
        prompt, vision = self._read(body)
        words: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        gone = threading.Event()
        speaker = threading.Thread(target=self._speak, args=(body, prompt, vision, words, gone))
        speaker.start()
        first, whole = True, False
        try:
            while (choice := await asyncio.to_thread(words.get)) is not None:
                event: dict[str, Any] = {"request_id": "r", "choices": [choice]}
                if first and self.fault != "silent":
                    event["prompt_token_ids"] = prompt + prompt[-1:] * (self.fault == "sees more")
                first = False
                yield f"data: {json.dumps(event)}\n\n"
                if self.fault == "breaks":
                    error = {"message": "out of memory", "type": "x", "code": 500}
                    yield f"data: {json.dumps({'error': error})}\n\n"
                    break
            whole = True
            yield "data: [DONE]\n\n"
        finally:
            gone.set()
            self.left += not whole

    def _read(self, body: dict[str, Any]) -> tuple[list[int], dict[str, Any]]:
        """The question as the model's stock processor sees it."""
        pictures = []
        for part in body.get("content_parts") or []:
            data = base64.b64decode(part["url"].partition(",")[2])
            pictures.append(Image.open(io.BytesIO(data)).convert("RGB"))
        if not pictures:
            return body["token_ids"], {}
        vision = dict(self.processor(images=pictures, return_tensors="pt"))
        return self._unfold(body["token_ids"], vision["image_grid_thw"]), vision

    def _unfold(self, ids: list[int], grids: torch.Tensor) -> list[int]:
        image = self.config[IMAGE_TOKEN]
        counts = iter((grids.prod(dim=1) // self.processor.merge_size**2).tolist())
        unfolded: list[int] = []
        for token in ids:
            unfolded += [image] * next(counts) if token == image else [token]
        return unfolded

    def _speak(
        self, body: dict[str, Any], prompt: list[int], vision: Any, words: Any, gone: Any
    ) -> None:
        sampling = body["sampling_params"]
        try:
            for choice in range(sampling["n"]):
                with self._lock:
                    self._answer(choice, sampling, prompt, vision, words, gone)
        finally:
            words.put(None)

    def _answer(
        self, choice: int, sampling: Any, prompt: list[int], vision: Any, words: Any, gone: Any
    ) -> None:
        ids = torch.tensor([prompt])
        ends, asked = sampling["stop_token_ids"], sampling["max_tokens"]
        heard: list[torch.Tensor] = []

        def hear(_: Any, scores: torch.Tensor) -> torch.Tensor:
            heard.append(scores[0].log_softmax(-1))
            return scores

        def tell(sequence: torch.Tensor, _: Any) -> torch.Tensor:
            self.pace.wait(20)
            token, said = int(sequence[0, -1]), sequence.shape[1] - len(prompt)
            reason = "stop" if token in ends else "length" if said == asked else None
            logprobs = None
            if sampling.get("logprobs") is not None:
                logprobs = {"content": [self._told(heard[-1], token, sampling["logprobs"])]}
            words.put(
                {
                    "index": choice,
                    "token_ids": [token],
                    "logprobs": logprobs,
                    "finish_reason": reason,
                }
            )
            return torch.tensor([gone.is_set() or reason is not None])

        warm = sampling["temperature"]
        torch.manual_seed(sampling.get("seed", 0) + choice)
        image = self.config[IMAGE_TOKEN]
        self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == image).int(),
            **vision,
            max_new_tokens=asked,
            do_sample=warm > 0,
            **({"temperature": warm, "top_p": sampling["top_p"], "top_k": 0} if warm else {}),
            eos_token_id=ends,
            pad_token_id=ends[0],
            logits_processor=[hear],
            stopping_criteria=[tell],
        )

    def _told(self, scores: torch.Tensor, token: int, count: int) -> dict[str, Any]:
        """The token that was said, then the likeliest, as vLLM orders them."""

        def entry(identifier: int) -> dict[str, Any]:
            return {"token_id": identifier, "logprob": float(scores[identifier]), "rank": 1}

        best = [other for other in scores.topk(count).indices.tolist() if other != token]
        return {**entry(token), "top_logprobs": [entry(token), *map(entry, best)]}


def serve(fake: Fake, socket: Path) -> uvicorn.Server:
    """A server that is not running yet."""
    return uvicorn.Server(
        uvicorn.Config(fake.app(), uds=str(socket), log_level="warning", lifespan="off")
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("verb", choices=["serve"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--uds", type=Path, required=True)
    for name in ("served-model-name", "generation-config", "allowed-media-domains"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("limit-mm-per-prompt", "max-num-seqs", "dtype", "config"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--enable-scale-out", action="store_true", required=True)
    parser.add_argument("--disable-uvicorn-access-log", action="store_true")
    options = parser.parse_args()
    sys.stderr.write("loading\n")
    serve(Fake(options.folder), options.uds).run()


if __name__ == "__main__":
    main()
