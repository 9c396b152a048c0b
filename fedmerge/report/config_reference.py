"""docs/config.md, written from the pydantic models so that it cannot say anything else: ``make docs``."""

import json
from collections.abc import Mapping
from typing import Any

from fedmerge.config import ExperimentConfig, to_flat

HEADER = """# Configuration

<!-- Written by `make docs` from fedmerge/config/sections.py; change the descriptions there. -->

One TOML file is one experiment; `configs/` holds some. Every key has a default, so a file names only what it changes:

```toml
name = "mine"

[domains]
root = "data/shops"
train = "books,toys"
unseen = ""
```

In files a list is one string with commas, and `"none"` switches off what can be off. On the command line
`--set train.max_steps=100 domains.train=books,toys` changes settings of a file. `fedmerge check FILE` names every
problem at once; an unknown key is one. `flwr run . --run-config FILE` takes the same files.
"""


def config_reference() -> str:
    """The reference as Markdown: one table a section, one row a key."""
    schema = ExperimentConfig.model_json_schema()
    defaults = to_flat(ExperimentConfig())
    sections = {key: _section(schema, field) for key, field in schema["properties"].items() if "$ref" in field}
    top = {"properties": {key: field for key, field in schema["properties"].items() if key not in sections}}
    parts = [HEADER, "## Top of the file\n\n" + _table(top, "", defaults)]
    for key, section in sections.items():
        parts.append(f"## [{key}]\n\n{section['description']}\n\n" + _table(section, f"{key}.", defaults))
    return "\n".join(parts)


def _section(schema: Mapping[str, Any], field: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = schema["$defs"][field["$ref"].rpartition("/")[2]]
    return found


def _table(section: Mapping[str, Any], prefix: str, defaults: Mapping[str, Any]) -> str:
    rows = ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
    for key, field in section["properties"].items():
        default = json.dumps(defaults[prefix + key], ensure_ascii=False)
        rows.append(f"| `{prefix}{key}` | {_values(field)} | `{default}` | {field['description']} |")
    return "\n".join(rows) + "\n"


def _values(field: Mapping[str, Any]) -> str:
    """What a setting may be, in words."""
    if "anyOf" in field:
        return " or ".join("`none`" if kind.get("type") == "null" else _values(kind) for kind in field["anyOf"])
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "pattern" in field:
        pattern = str(field["pattern"]).replace("|", "\\|")
        return f"text of the form `{pattern}`"
    if field["type"] == "array":
        least = " (not empty)" if field.get("minItems") else ""
        return f"list{least}: {_values(field['items'])}"
    word = {"integer": "integer", "number": "number", "boolean": "`true`, `false`", "string": "text"}[field["type"]]
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {field[bound]}" for bound, sign in signs.items() if bound in field]
    return ", ".join([word, *bounds])


if __name__ == "__main__":
    print(config_reference(), end="")
