"""The payloads of all tasks as one JSON Schema (2020-12), for producers in other languages.

    {"$schema": ..., "type": "object", "properties": {"SEND_MAIL": {the payload's schema}, ...}, "$defs": {...}}

A payload is described as it is stored: by its type, and without the tag, which is in the row's column `type`. So
#/properties/SEND_MAIL validates a payload of that type. A code generator makes one class, with a member for each type.

It is msgspec's schema, with three facts added that msgspec leaves out and compatible.py needs: the format of a datetime
without a rule for its zone, which keys a dict may have if they aren't str, and the exact lengths of bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias, cast

import msgspec
import msgspec.inspect as mi

from ..errors import ConfigError
from ..registry import Registry

DIALECT = "https://json-schema.org/draft/2020-12/schema"
DEFS = "#/$defs/"

Schema: TypeAlias = dict[str, Any]


def document(registry: Registry) -> Schema:
    """The schema of an app's tasks, the same for the same tasks. Raises ConfigError for types that have no schema."""
    handlers = [handler for type in registry.types if (handler := registry.get(type))]
    tasks = [handler.task for handler in handlers]
    try:
        infos = {info.cls: info for info in _classes(mi.multi_type_info(tasks), set())}
        refs, defs = msgspec.json.schema_components(list(infos), ref_template=DEFS + "{name}")
    except TypeError as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"no JSON Schema can be made of these tasks: {why}") from error
    except KeyError as error:  # msgspec raises it for two classes of the same name
        raise ConfigError(f"no JSON Schema can be made: another class has the name of {error} in its module") from error
    names = dict(zip(infos, (ref["$ref"].removeprefix(DEFS) for ref in refs), strict=True))
    for cls, info in infos.items():
        _mark_class(defs[names[cls]], info)
    payloads = {handler.type: _payload(defs[names[handler.task]]) for handler in handlers}
    used = _used(payloads, defs)
    return {
        "$schema": DIALECT,
        "title": "Tasks",
        "description": "The payload of each type of task.",
        "type": "object",
        "properties": payloads,
        "required": list(payloads),  # so that a generated class has no optional members
        "additionalProperties": False,
        "$defs": {name: defs[name] for name in sorted(used)},
    }


def render(schema: Schema) -> str:
    """The text that `notifyq schema` prints."""
    return msgspec.json.format(msgspec.json.encode(schema), indent=2).decode() + "\n"


def parse(text: bytes) -> Schema:
    """The schema of a text that `render` made. Raises ValueError for another text."""
    schema = msgspec.json.decode(text, type=dict[str, Any])
    if schema.get("$schema") != DIALECT or not isinstance(schema.get("properties"), dict):
        raise ValueError("it has no $schema, or no properties")
    return schema


def _payload(task: Schema) -> Schema:
    """The schema of a task without its tag. A task in a field of another one keeps its tag."""
    properties = {name: schema for name, schema in task["properties"].items() if name != "$type"}
    required = [name for name in task["required"] if name != "$type"]
    return {**task, "properties": properties, "required": required}


def _classes(value: Any, seen: set[Any]) -> Iterator[Any]:
    """The types inside `value` that have a definition of their own in the schema."""
    if isinstance(value, mi.Type | mi.Field):
        cls = getattr(value, "cls", None)
        if cls in seen:
            return
        if cls is not None:
            seen.add(cls)
            yield value
        for name in value.__struct_fields__:
            yield from _classes(getattr(value, name), seen)
    elif isinstance(value, tuple | list):
        for part in cast("Sequence[Any]", value):
            yield from _classes(part, seen)


def _used(payloads: Schema, defs: Schema) -> set[str]:
    """The names of the definitions that the payloads refer to, directly or through others."""
    used: set[str] = set()
    waiting: list[Any] = [payloads]
    while waiting:
        for name in _refs(waiting.pop()):
            if name not in used:
                used.add(name)
                waiting.append(defs[name])
    return used


def _refs(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        inner = cast("dict[str, Any]", value)
        if isinstance(ref := inner.get("$ref"), str):
            yield ref.removeprefix(DEFS)
        for part in inner.values():
            yield from _refs(part)
    elif isinstance(value, list):
        for part in cast("Sequence[Any]", value):
            yield from _refs(part)


def _mark_class(schema: Schema, info: mi.Type) -> None:
    match info:
        case mi.StructType(array_like=True) | mi.NamedTupleType():
            # They are paired from the end, as a tag may come first.
            for part, field in zip(reversed(schema["prefixItems"]), reversed(info.fields), strict=False):
                _mark(part, field.type)
        case mi.StructType() | mi.DataclassType() | mi.TypedDictType():
            for field in info.fields:
                _mark(schema["properties"][field.encode_name], field.type)
        case _:
            pass


def _mark(schema: Schema, info: mi.Type) -> None:
    """Add the facts that msgspec leaves out to its schema of this type. `_mark_class` does so for classes."""
    while isinstance(info, mi.Metadata):
        info = info.type
    match info:
        case mi.DateTimeType(tz=None):
            schema["format"] = "iso-date-time"
        case mi.DateTimeType(tz=False):
            schema["format"] = "date-time-local"
        case mi.TimeType(tz=None):
            schema["format"] = "iso-time"
        case mi.BytesType() | mi.ByteArrayType() | mi.MemoryViewType():
            sizes = {"x-minBytes": info.min_length, "x-maxBytes": info.max_length}
            schema.update({name: size for name, size in sizes.items() if size is not None})
        case mi.UnionType():
            # msgspec sorts the members. A union has at most one member of each kind that can be marked.
            for member in info.types:
                kind = _kind(member)
                for branch in schema["anyOf"]:
                    if branch.get("type") == kind:
                        _mark(branch, member)
        case mi.TupleType():
            for part, item in zip(schema.get("prefixItems", ()), info.item_types, strict=True):
                _mark(part, item)
        case mi.CollectionType():
            if "items" in schema:
                _mark(schema["items"], info.item_type)
        case mi.DictType():
            if "additionalProperties" in schema:
                _mark(schema["additionalProperties"], info.value_type)
            if (keys := _keys(info.key_type)) is not None:
                schema["propertyNames"] = keys
        case _:
            pass


def _kind(info: mi.Type) -> str | None:
    while isinstance(info, mi.Metadata):
        info = info.type
    match info:
        case mi.DictType():
            return "object"
        case mi.CollectionType() | mi.TupleType():
            return "array"
        case mi.DateTimeType() | mi.TimeType() | mi.BytesType() | mi.ByteArrayType() | mi.MemoryViewType():
            return "string"
        case _:
            return None


def _keys(info: mi.Type) -> Schema | None:
    """The schema of a dict's keys if they aren't str. msgspec writes the rules of str keys itself."""
    while isinstance(info, mi.Metadata):
        info = info.type
    match info:
        case mi.StrType() | mi.AnyType():
            return None
        case mi.EnumType():
            return {"enum": sorted(str(member.value) for member in info.cls)}
        case mi.LiteralType():
            return {"enum": sorted(map(str, info.values))}
        case mi.IntType(gt=None, ge=None, lt=None, le=None, multiple_of=None):
            return {"format": "integer"}
        case _:
            return {"format": repr(info)}  # no validator knows this format, but compatible.py sees a change of it
