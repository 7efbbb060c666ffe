"""YAML into a schema: keys that were never meant are errors, and errors say what is accepted."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from offload.errors import PolicyError
from offload.sizes import show as _show

Config = TypeVar("Config", bound=BaseModel)


def load_config(
    schema: type[Config],
    source: str | Path | Mapping[str, object] | BaseModel,
    overrides: Sequence[str] = (),
) -> Config:
    """Return what a YAML file, a mapping or a model says, as the schema has it, overrides applied.

    An override is "key.path=YAML value". Every field of the schema needs a description. Raises
    PolicyError with a line per bad key: its path, value, what is accepted, and for an unknown key
    the nearest one."""
    name, tree = _read_source(source, schema)
    origins = {_apply_override(tree, override): override for override in overrides}
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        problems: dict[str, str] = {}
        for detail in error.errors(include_url=False):
            path, problem = _describe(detail, schema)
            # A union reports each of its members: one line is enough.
            problems.setdefault(path, problem + _blame(path, origins))
        lines = [f"{path}: {problem}" for path, problem in problems.items()]
        raise PolicyError(f"policy {name}: " + "\n  ".join(lines)) from error


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice; PyYAML alone would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                problem = f"key {key.value!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(str(key.value))
        return cast(dict[Any, Any], super().construct_mapping(node, deep))


def _load_yaml(text: str | bytes, name: str) -> object:
    try:
        return yaml.load(text, _Loader)  # safe: a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: 2024-99-99
        raise PolicyError(f"{name}: not valid YAML: {error}") from error


def _read_source(
    source: str | Path | Mapping[str, object] | BaseModel, schema: type[BaseModel]
) -> tuple[str, dict[Any, Any]]:
    """Return what to call the source in messages, and its content as dicts of our own."""
    if isinstance(source, BaseModel):
        return "object", source.model_dump()
    if isinstance(source, Mapping):
        return "mapping", _own_dicts(source, depth=3)
    name = str(source)
    try:
        data = Path(source).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise PolicyError(f"policy {name}: cannot be read as a YAML file: {error}") from error
    tree = _load_yaml(data, f"policy {name}")
    if not isinstance(tree, dict):
        raise PolicyError(
            f"policy {name}: {_show(tree)} is not a mapping; "
            f"accepted keys: {', '.join(schema.model_fields)}"
        )
    return name, tree


def _own_dicts(tree: Mapping[Any, Any], depth: int) -> dict[Any, Any]:
    """Copy mappings to dicts, as deep as the keys go: what lies below may be cyclic."""
    return {
        key: _own_dicts(value, depth - 1) if depth > 1 and isinstance(value, Mapping) else value
        for key, value in tree.items()
    }


def _apply_override(tree: dict[Any, Any], override: str) -> str:
    """Set one "key.path=YAML value" in the tree and return its key path."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise PolicyError(
            f"override {override!r}: write key.path=value, such as tiers.cpu.budget=24GiB"
        )
    value = _load_yaml(text, f"override {override!r}")
    for depth, key in enumerate(keys[:-1], start=1):
        child = tree.get(key)
        child = child.model_dump() if isinstance(child, BaseModel) else child
        if child is not None and not isinstance(child, Mapping):
            raise PolicyError(
                f"override {override!r}: {'.'.join(keys[:depth])} is {_show(child)}, "
                "which has no keys below it"
            )
        tree[key] = dict(child or {})  # a copy: below the third level the dict may be the caller's
        tree = tree[key]
    tree[keys[-1]] = value
    return ".".join(keys)


def _blame(path: str, origins: Mapping[str, str]) -> str:
    for key, override in origins.items():
        if f"{path}.".startswith(f"{key}."):
            return f" (from override {override!r})"
    return ""


def _describe(detail: ErrorDetails, schema: type[BaseModel]) -> tuple[str, str]:
    """Return the key path of a pydantic error and what to say about it."""
    known = _key_descriptions(schema)
    path = ""
    for part in detail["loc"]:
        path = f"{path}.{part}" if path else str(part)
        if not any(key.startswith(f"{path}.") for key in known):
            break  # a leaf or an unknown key: what pydantic appends names members of a union
    value = detail["input"]
    if path not in known:
        return path, f"unknown key (value {_show(value)}); {_nearest(path, known)}"
    accepted = f"; accepted: {known[path]}"
    if detail["type"] == "missing":
        return path, f"missing{accepted}"
    cause = detail.get("ctx", {}).get("error")
    return path, (str(cause) if cause else f"{_show(value)} is not accepted") + accepted


def _nearest(path: str, known: Mapping[str, str]) -> str:
    """Return the accepted keys beside an unknown one, after the key that was probably meant."""
    parent, _, key = path.rpartition(".")
    siblings = [other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == parent]
    near = [
        f"{parent}.{match}".lstrip(".") for match in difflib.get_close_matches(key, siblings, n=1)
    ]
    elsewhere = [other for other in known if other.rpartition(".")[2] == key]
    if not near and len(elsewhere) == 1:  # a right key in the wrong place
        near = elsewhere
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{hint}accepted keys: {', '.join(siblings)}"


def _key_descriptions(model: type[BaseModel], prefix: str = "") -> dict[str, str]:
    """Return every key path of the YAML with what it accepts, sections before their keys."""
    descriptions: dict[str, str] = {}
    for name, field in model.model_fields.items():
        descriptions[prefix + name] = field.description or ""
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                descriptions |= _key_descriptions(kind, f"{prefix}{name}.")
    return descriptions
