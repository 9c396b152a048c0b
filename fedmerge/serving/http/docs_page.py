"""The OpenAPI description as a page that loads nothing from elsewhere."""

import html
import json
from typing import Any


def page_of(schema: dict[str, Any]) -> str:
    """Return the page of an OpenAPI description."""
    parts = []
    for path, methods in schema["paths"].items():
        for method, route in methods.items():
            parts.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2>")
            parts.append(f"<p>{html.escape(route.get('description', ''))}</p>")
            if queries := [query for query in route.get("parameters", []) if query["in"] == "query"]:
                parts.append(f"<h3>Query</h3>{_fields(_schema_of(queries))}")
            body = route.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            answer = route["responses"].get("200", {}).get("content", {}).get("application/json", {}).get("schema", {})
            for title, part in (("Request", body), ("Answer", answer)):
                name = str(part.get("$ref", "")).rpartition("/")[2]
                if name:
                    parts.append(f"<h3>{title}</h3>{_fields(schema['components']['schemas'][name])}")
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>fedmerge serve</title>
<style>body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
color-scheme: light dark }} td, th {{ text-align: left; vertical-align: top; padding: .2rem .8rem .2rem 0 }}
table {{ border-collapse: collapse }} h2 {{ margin-top: 2.5rem }}</style>
<h1>{html.escape(schema["info"]["title"])} {html.escape(schema["info"]["version"])}</h1>
<p>{html.escape(schema["info"]["description"])} Machine-readable: <a href="/openapi.json">openapi.json</a>.</p>
{"".join(parts)}
</html>
"""


def _schema_of(queries: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the parameters of a query as a schema of an object."""
    return {
        "required": [query["name"] for query in queries if query.get("required")],
        "properties": {query["name"]: query["schema"] for query in queries},
    }


def _fields(schema: dict[str, Any]) -> str:
    required = schema.get("required", [])
    rows = []
    for name, field in schema["properties"].items():
        kinds = sorted({str(part.get("type", "object")) for part in field.get("anyOf", [field])})
        limits = [f"{key} {field[key]}" for key in ("minimum", "maximum", "minItems", "maxItems") if key in field]
        default = (
            "required" if name in required else f"default {json.dumps(field['default'])}" if "default" in field else ""
        )
        cells = (
            f"<code>{name}</code>",
            ", ".join([*kinds, *limits]),
            default,
            html.escape(field.get("description", "")),
        )
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<table>{''.join(rows)}</table>"
