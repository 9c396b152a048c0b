"""Texts that repeat the configuration's keys: docs/config.md, and the section of pyproject.toml for Flower."""

import json
import re
from collections.abc import Mapping
from typing import Any

from fedmerge.config import ExperimentConfig, MergeRec, declared, flat_to_toml, to_flat

HEADER = """# Configuration

<!-- Written by `make docs` from fedmerge/config; change the descriptions there. -->

One TOML file is one experiment; `configs/` holds some. Every key has a default, so a file names only what it changes:

```toml
name = "mine"

[domains]
root = "data/shops"
train = "books,toys"
unseen = ""
```

In files a list is one string with commas, and `"none"` switches off what can be off. On the command line
`--set train.max_steps=100 domains.train=books,toys` changes settings of a file. `fedmerge check FILE` lists all
problems at once; an unknown key is one. `flwr run . --run-config FILE` takes the same files.
"""

START, END = "[tool.flwr.app.config]\n", "\n[tool.pytest"  # what stands before and after the keys in pyproject.toml


def config_reference() -> str:
    """Return the reference as Markdown: one table a section, one row a key."""
    schema = ExperimentConfig.model_json_schema()
    defaults, paper = to_flat(ExperimentConfig()), to_flat(ExperimentConfig(mergerec=MergeRec(preset="paper")))
    shown = {key: json.dumps(value, ensure_ascii=False) for key, value in defaults.items()}
    cells = {
        key: f"`{shown[key]}`" + (f"; paper: `{json.dumps(value)}`" if value != defaults[key] else "")
        for key, value in (paper | {"mergerec.preset": "default"}).items()
    }
    sections = {key: _section(schema, field) for key, field in schema["properties"].items() if "$ref" in field}
    top = {"properties": {key: field for key, field in schema["properties"].items() if key not in sections}}
    parts = [HEADER, "## Top of the file\n\n" + _table(top, "", cells)]
    for key, section in sections.items():
        parts.append(f"## [{key}]\n\n{section['description']}\n\n" + _table(section, f"{key}.", cells))
    return "\n".join(parts)


def with_declared_keys(pyproject: str) -> str:
    """Return the text of pyproject.toml with every key of the configuration declared to Flower."""
    before, _, rest = pyproject.partition(START)
    after = rest[rest.index(END) :]
    return f"{before}{START}{flat_to_toml(declared(), 'tool.flwr.app.config.')}{after}"


def _section(schema: Mapping[str, Any], field: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = schema["$defs"][field["$ref"].rpartition("/")[2]]
    return found


def _table(section: Mapping[str, Any], prefix: str, defaults: Mapping[str, str]) -> str:
    rows = ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
    for key, field in section["properties"].items():
        rows.append(f"| `{prefix}{key}` | {_values(field)} | {defaults[prefix + key]} | {field['description']} |")
    return "\n".join(rows) + "\n"


def _values(field: Mapping[str, Any]) -> str:
    """Describe the values that a setting takes."""
    if "anyOf" in field:
        return " or ".join("`none`" if kind.get("type") == "null" else _values(kind) for kind in field["anyOf"])
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "pattern" in field:
        pattern = re.sub(r"\|", r"\\|", str(field["pattern"]))
        return f"text of the form `{pattern}`"
    if field["type"] == "array":
        least = " (not empty)" if field.get("minItems") else ""
        return f"list{least}: {_values(field['items'])}"
    word = {"integer": "integer", "number": "number", "boolean": "`true`, `false`", "string": "text"}[field["type"]]
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {field[bound]}" for bound, sign in signs.items() if bound in field]
    return ", ".join([word, *bounds])
