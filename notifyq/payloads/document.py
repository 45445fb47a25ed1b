"""The payloads of all tasks as one JSON Schema (2020-12), for producers in other languages.

    {"$schema": ..., "type": "object", "properties": {"SEND_MAIL": {the payload's schema}, ...}, "$defs": {...}}

By type, as it is stored: without the tag, which is in the row's `type` column. So #/properties/SEND_MAIL is what a
payload is validated against, and a generator of code makes of it one type with a member for each.

It is msgspec's schema, and what that leaves out but compatible.py must know: a datetime without a rule for its zone is
just a string there, keys of a dict that aren't str are just keys, and lengths of bytes are rounded to base64's.
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
    """The schema of an app's tasks. The same for the same tasks. Raises ConfigError for what JSON Schema can't say."""
    handlers = [handler for type in registry.types if (handler := registry.get(type))]
    tasks = [handler.task for handler in handlers]
    try:
        infos = {info.cls: info for info in _classes(mi.multi_type_info(tasks), set())}
        refs, defs = msgspec.json.schema_components(list(infos), ref_template=DEFS + "{name}")
    except TypeError as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"no JSON Schema can be made of these tasks: {why}") from error
    except KeyError as error:  # msgspec's way to say it
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
        "required": list(payloads),  # of a type with a member for each, none is optional
        "additionalProperties": False,
        "$defs": {name: defs[name] for name in sorted(used)},
    }


def render(schema: Schema) -> str:
    """As it is printed."""
    return msgspec.json.format(msgspec.json.encode(schema), indent=2).decode() + "\n"


def parse(text: bytes) -> Schema:
    """What `render` made. Raises ValueError."""
    schema = msgspec.json.decode(text, type=dict[str, Any])
    if schema.get("$schema") != DIALECT or not isinstance(schema.get("properties"), dict):
        raise ValueError("it has no $schema, or no properties")
    return schema


def _payload(task: Schema) -> Schema:
    """Without the tag. A task that is a field of another one has its own."""
    properties = {name: schema for name, schema in task["properties"].items() if name != "$type"}
    required = [name for name in task["required"] if name != "$type"]
    return {**task, "properties": properties, "required": required}


def _classes(value: Any, seen: set[Any]) -> Iterator[Any]:
    """What has a definition of its own, wherever in these types it is."""
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
    """The names of the definitions that are referred to, from the payloads on."""
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
            # From the end, as a tag comes first.
            for part, field in zip(reversed(schema["prefixItems"]), reversed(info.fields), strict=False):
                _mark(part, field.type)
        case mi.StructType() | mi.DataclassType() | mi.TypedDictType():
            for field in info.fields:
                _mark(schema["properties"][field.encode_name], field.type)
        case _:
            pass


def _mark(schema: Schema, info: mi.Type) -> None:
    """Add to msgspec's schema of this type what it leaves out. Classes are marked by themselves."""
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
            # msgspec puts its members in another order; of what can be marked it allows one each of these kinds.
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
    """What keys of a dict must be, where they aren't str, whose rules msgspec writes down."""
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
            return {"format": repr(info)}  # nobody else knows it, but a change shows
