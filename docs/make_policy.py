#!/usr/bin/env python3
"""Write the lists of keys in docs/policy.md from the schemas that check the YAML.

Run as: python docs/make_policy.py
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from offload.jobconfig import FinetuneConfig
from offload.policy import policy_schema

PAGE = Path(__file__).with_name("policy.md")
WIDTH = 118


def main() -> None:
    PAGE.write_text(render(PAGE.read_text()))


def render(page: str) -> str:
    """The text of docs/policy.md with its lists written anew."""
    policy = policy_schema()
    job = FinetuneConfig.model_json_schema()
    known = policy["properties"]
    own = {key: field for key, field in job["properties"].items() if key not in known}
    page = fill(page, "policy keys", key_list(policy))
    return fill(page, "job keys", key_list({**job, "properties": own}))


def fill(page: str, name: str, text: str) -> str:
    """Put `text` between the two marks of a block."""
    before, start, rest = page.partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    if not (start and end):
        raise ValueError(f"{PAGE.name} has no block {name!r}; put its two marks back.")
    return before + start + text + end + after


def key_list(schema: dict[str, Any]) -> str:
    """A Markdown list of every leaf key below `schema`."""
    rows = (f"- `{path}` ({default}): {text}" for path, default, text in leaves(schema))
    return "\n".join(textwrap.fill(row, WIDTH, subsequent_indent="  ") for row in rows) + "\n"


def leaves(schema: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield (key path, default as Markdown, description) of every key that is no mapping."""
    definitions = schema.get("$defs", {})

    def walk(section: dict[str, Any], prefix: str, need: str) -> Iterator[tuple[str, str, str]]:
        for key, field in section.get("properties", {}).items():
            below = section_of(field, definitions)
            if below is not None:
                optional = {"type": "null"} in field.get("anyOf", ())
                inner = f"required with `{prefix}{key}`" if optional else need
                yield from walk(below, f"{prefix}{key}.", inner)
            else:
                is_required = key in section.get("required", ())
                default = need if is_required else f"`{shown(field.get('default'))}`"
                yield prefix + key, default, field["description"]

    yield from walk(schema, "", "required")


def section_of(field: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any] | None:
    """The section that a key holds, or may hold; None for a leaf."""
    for choice in (field, *field.get("anyOf", ()), *field.get("allOf", ())):
        name = choice.get("$ref", "").rpartition("/")[2]
        if "properties" in definitions.get(name, {}):
            section: dict[str, Any] = definitions[name]
            return section
    return None


def shown(value: object) -> str:
    """A default as YAML would have it."""
    words = {None: "null", True: "true", False: "false"}
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(str, value))}]"
    is_word = value is None or isinstance(value, bool)
    return words[value] if is_word else str(value).replace("\n", "\\n")


if __name__ == "__main__":
    main()
