"""The page that describes the API: written from its OpenAPI schema, without scripts."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from typing import Any

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem;
       color: #1b1f24; background: #fff; }
code, pre { font: 14px/1.45 ui-monospace, monospace; }
pre { background: #f4f5f7; padding: .8rem 1rem; overflow-x: auto; border-radius: 6px; }
h2 { margin-top: 2.2rem; border-top: 1px solid #dde1e6; padding-top: 1.2rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .35rem .8rem .35rem 0;
         border-bottom: 1px solid #eceef1; }
@media (prefers-color-scheme: dark) {
  body { color: #e6e8eb; background: #15181c; } pre { background: #22262c; }
  h2, th, td { border-color: #333941; } a { color: #8ab4f8; }
}
"""


def page(schema: Mapping[str, Any], model: str) -> str:
    """The page's HTML.

    Args:
        schema: The OpenAPI schema.
        model: The name of a model to show in examples.
    """
    sections = [
        _operation(path, method, operation)
        for path, methods in schema["paths"].items()
        for method, operation in methods.items()
    ]
    info = schema["info"]
    title = html.escape(f"{info['title']} {info['version']}")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head><body>"
        f"<h1>{title}</h1><p>{html.escape(info['summary'])}. "
        'The schema: <a href="openapi.json">openapi.json</a>.</p>'
        f"<pre>{html.escape(_example(model))}</pre>{''.join(sections)}</body></html>"
    )


def _example(model: str) -> str:
    request = {
        "model": model,
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,…"}},
                    {"type": "text", "text": "What is this?"},
                ],
            }
        ],
    }
    return "POST /v1/chat/completions\nContent-Type: application/json\n\n" + json.dumps(
        request, indent=2, ensure_ascii=False
    )


def _operation(path: str, method: str, operation: Mapping[str, Any]) -> str:
    head = f"<h2><code>{method.upper()} {html.escape(path)}</code></h2>"
    head += f"<p>{html.escape(operation.get('summary', ''))}.</p>"
    if "requestBody" not in operation:
        return head
    fields = operation["requestBody"]["content"]["application/json"]["schema"]
    required = set(fields.get("required", ()))
    rows = "".join(
        f"<tr><td><code>{html.escape(name)}</code></td><td>{html.escape(_kind(value))}"
        f"{', required' if name in required else ''}</td>"
        f"<td>{html.escape(value.get('description', ''))}</td></tr>"
        for name, value in fields["properties"].items()
    )
    return f"{head}<table><tr><th>field</th><th>type</th><th>meaning</th></tr>{rows}</table>"


def _kind(value: Mapping[str, Any]) -> str:
    kinds = [each.get("type", "object") for each in value.get("anyOf", (value,))]
    return " or ".join(kind for kind in kinds if kind != "null")
