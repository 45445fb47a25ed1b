"""Whether payloads that were enqueued under an earlier schema still decode: a comparison of two documents.

For each type, the present schema must allow every payload that the earlier one allows. Each place where it doesn't is a
break, reported with its path in the payload. A case that can't be decided counts as a break.

Two things are assumed. A payload has no field that its type didn't have. And a payload that the schema allows can be
decoded: a __post_init__ that refuses more isn't seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, cast

from .document import DEFS, Schema

ANYTHING: Schema = {}


class Break(NamedTuple):
    """A change that breaks queued tasks."""

    type: str
    path: str  # in msgspec's notation: $.user.email, $.items[...]
    what: str
    cure: str

    def __str__(self) -> str:
        return f"{self.type} {self.path}: {self.what}; {self.cure}"


# ---------------------------------------------------------------------------------------- rules for single values


class Rule(NamedTuple):
    """A limit that a schema may set on a value."""

    name: str
    get: Callable[[Schema], Any]  # the limit that a schema sets; None: it sets none
    keeps: Callable[[Any, Any], bool]  # (old, new): whether the new limit allows each value that the old one allows


def _least(schema: Schema) -> tuple[float, int] | None:
    whole = schema.get("type") == "integer"
    bounds = [(schema["minimum"], 0)] if "minimum" in schema else []
    if (over := schema.get("exclusiveMinimum")) is not None:
        bounds.append((over + 1, 0) if whole and over == int(over) else (over, 1))
    return max(bounds, default=None)


def _most(schema: Schema) -> tuple[float, int] | None:
    whole = schema.get("type") == "integer"
    bounds = [(schema["maximum"], 0)] if "maximum" in schema else []
    if (under := schema.get("exclusiveMaximum")) is not None:
        bounds.append((under - 1, 0) if whole and under == int(under) else (under, -1))
    return min(bounds, default=None)


def _keyword(name: str, keeps: Callable[[Any, Any], bool]) -> Rule:
    def get(schema: Schema) -> Any:
        return schema.get(name)

    return Rule(name, get, keeps)


def _from(old: Any, new: Any) -> bool:
    return bool(new <= old)


def _to(old: Any, new: Any) -> bool:
    return bool(new >= old)


def _same(old: Any, new: Any) -> bool:
    return bool(old == new)


def _divides(old: Any, new: Any) -> bool:
    return bool(old == new or (isinstance(old, int) and isinstance(new, int) and old % new == 0))


WIDER = {  # pairs (old, new) of formats where the new one allows each value that the old one allows
    ("date-time", "iso-date-time"),
    ("date-time-local", "iso-date-time"),
    ("time", "iso-time"),
    ("partial-time", "iso-time"),
}

RULES = (
    Rule("minimum", _least, _from),
    Rule("maximum", _most, _to),
    _keyword("multipleOf", _divides),
    _keyword("minLength", _from),
    _keyword("maxLength", _to),
    _keyword("x-minBytes", _from),
    _keyword("x-maxBytes", _to),
    _keyword("minItems", _from),
    _keyword("maxItems", _to),
    _keyword("minProperties", _from),
    _keyword("maxProperties", _to),
    _keyword("pattern", _same),
    _keyword("contentEncoding", _same),
    _keyword("format", lambda old, new: old == new or (old, new) in WIDER),
)

# --------------------------------------------------------------------------------------------------- the cures

TYPE_GONE = "keep its handler until no such task is left, or cancel those"
REQUIRED = "give it a default"
FORBIDDEN = "keep the field, or drop forbid_unknown_fields, until no such task is left"
FORBIDS = "drop forbid_unknown_fields until no such task is left"
NARROWED = "keep taking it until no such task is left: widen the type, or make it a union with the earlier one"
TIGHTENED = "keep the earlier limit until no such task is left"
CHOICE_GONE = "keep it until no such task is left"


def breaks(old: Schema, new: Schema) -> list[Break]:
    """The changes that break tasks enqueued under `old` for an app whose schema is `new`, by type and field."""
    found: list[Break] = []
    for type, schema in sorted(old["properties"].items()):
        if type not in new["properties"]:
            found.append(Break(type, "$", "no handler takes this type any more", TYPE_GONE))
        else:
            found += _Comparison(type, old, new).compare("$", schema, new["properties"][type], frozenset())
    return found


class _Comparison:
    """Compares the two schemas of one type.

    `within` has the pairs that calls further up are comparing. Types may refer to themselves, and such a pair has no
    breaks but those that the calls further up find.
    """

    def __init__(self, type: str, old: Schema, new: Schema) -> None:
        self._type = type
        self._old: Schema = old.get("$defs", {})
        self._new: Schema = new.get("$defs", {})

    def compare(self, path: str, old: Schema, new: Schema, within: frozenset[tuple[int, int]]) -> list[Break]:
        if (id(old), id(new)) in within:
            return []
        within |= {(id(old), id(new))}
        olds, news = list(_choices(old, self._old)), list(_choices(new, self._new))
        # If there is one class on each side, the new one replaces the old one, even if its name differs.
        named = max(sum(_kind(one) == "object" for one in each) for each in (olds, news)) > 1
        found: list[Break] = []
        for one in olds:
            tried = [(_likeness(one, other, named), self._single(path, one, other, within)) for other in news]
            if all(broken for _, broken in tried):
                likeness, broken = max(tried, key=lambda each: (each[0], -len(each[1])))
                if (len(olds) > 1 or len(news) > 1 or "const" in one) and likeness < _ALIKE:
                    cure = NARROWED if len(olds) == 1 else CHOICE_GONE
                    broken = [self._break(path, f"{_named(one)} isn't taken any more, only {_list(news)}", cure)]
                found += broken
        return found

    def _single(self, path: str, old: Schema, new: Schema, within: frozenset[tuple[int, int]]) -> list[Break]:
        """Compare two schemas that aren't unions."""
        kind, other = _kind(old), _kind(new)
        if other == "anything":
            return []
        if "const" in new:
            if "const" in old and old["const"] == new["const"]:
                return []
            return [self._break(path, f"was {_named(old)}, is only {_named(new)}", NARROWED)]
        if kind != other and (kind, other) != ("integer", "number"):
            return [self._break(path, f"was {_named(old)}, is {_named(new)}", NARROWED)]
        found = [
            self._break(
                path, f"{rule.name} {_shown(now)}, was {_shown(was) if was is not None else 'not set'}", TIGHTENED
            )
            for rule in RULES
            if (now := rule.get(new)) is not None and ((was := rule.get(old)) is None or not rule.keeps(was, now))
        ]
        if kind == "object":
            found += self._object(path, old, new, within)
        elif kind == "array":
            found += self._array(path, old, new, within)
        return found

    def _object(self, path: str, old: Schema, new: Schema, within: frozenset[tuple[int, int]]) -> list[Break]:
        """Compare classes, which have `properties`, and dicts, which have none."""
        found: list[Break] = []
        fields: Schema = old.get("properties", {})
        news: Schema = new.get("properties", {})
        rest = new.get("additionalProperties", ANYTHING)
        for name, schema in fields.items():
            if name in news:
                found += self.compare(f"{path}.{name}", schema, news[name], within)
            elif rest is False:
                found.append(
                    self._break(f"{path}.{name}", "is no field any more, and unknown ones are forbidden", FORBIDDEN)
                )
            else:
                found += self.compare(f"{path}.{name}", schema, rest, within)
        if "properties" not in old:
            values = old.get("additionalProperties", ANYTHING)
            for name, schema in news.items():
                found += self.compare(f"{path}.{name}", values, schema, within)
            if rest is False:
                found.append(self._break(path, f"was {_named(old)}, is {_named(new)}", NARROWED))
            else:
                found += self.compare(f"{path}[...]", values, rest, within)
        elif rest is False and old.get("additionalProperties") is not False:
            found.append(self._break(path, "unknown fields are forbidden now, and there may be some", FORBIDS))
        had = old.get("required", ())
        for name in new.get("required", ()):
            if name not in had:
                what = "has lost its default" if name in fields else "is required, and queued payloads don't have it"
                found.append(self._break(f"{path}.{name}", what, REQUIRED + _renamed(name, fields, news)))
        if "propertyNames" in new:
            keys: Schema = {"enum": list(fields)} if "properties" in old else _text(old.get("propertyNames", {}))
            found += self.compare(f"{path} (a key)", keys, _text(new["propertyNames"]), within)
        return found

    def _array(self, path: str, old: Schema, new: Schema, within: frozenset[tuple[int, int]]) -> list[Break]:
        """Compare lists, which have `items`, and tuples and array-like classes, which have `prefixItems`.

        RULES has the limits on their lengths.
        """
        found: list[Break] = []
        firsts: list[Schema] = old.get("prefixItems", [])
        news: list[Schema] = new.get("prefixItems", [])
        rest, new_rest = old.get("items", not firsts and ANYTHING), new.get("items", ANYTHING)
        for i in range(max(len(firsts), len(news))):
            one = firsts[i] if i < len(firsts) else rest
            other = news[i] if i < len(news) else new_rest
            if one is not False and other is not False:
                found += self.compare(f"{path}[{i}]", one, other, within)
        if rest is not False and new_rest is not False:
            found += self.compare(f"{path}[...]", rest, new_rest, within)
        if new.get("uniqueItems") and not old.get("uniqueItems") and "minItems" in new:
            found.append(self._break(path, "is a set now, with a least size, and equal items count once", TIGHTENED))
        return found

    def _break(self, path: str, what: str, cure: str) -> Break:
        return Break(self._type, path, what, cure)


_ALIKE = 2


def _likeness(old: Schema, new: Schema, named: bool) -> int:
    """How likely it is that `new` replaces `old`: 0 to _ALIKE."""
    if "const" in old or "const" in new or _kind(old) != _kind(new):
        return 0
    return 1 if named and _kind(old) == "object" and old.get("title") != new.get("title") else _ALIKE


def _choices(schema: Schema, defs: Schema) -> Iterator[Schema]:
    """The members of a union or the values of an enum as schemas; else the schema itself. References are followed."""
    if (ref := schema.get("$ref")) is not None:
        yield from _choices(defs[ref.removeprefix(DEFS)], defs)
    elif "anyOf" in schema:
        for choice in schema["anyOf"]:
            yield from _choices(choice, defs)
    elif "enum" in schema:
        for value in schema["enum"]:
            yield _constant(value)
    else:
        yield schema


def _constant(value: Any) -> Schema:
    """The schema of one value, with the tightest limits, so that RULES can decide whether another schema allows it."""
    match value:
        case None:
            return {"type": "null", "const": value}
        case bool():
            return {"type": "boolean", "const": value}
        case int():
            return {"type": "integer", "const": value, "minimum": value, "maximum": value, "multipleOf": value}
        case str():
            return {"type": "string", "const": value, "minLength": len(value), "maxLength": len(value)}
        case _:
            return {"type": "unknown", "const": value}


def _text(schema: Schema) -> Schema:
    return {"type": "string", **schema}


def _kind(schema: Schema) -> str:
    return str(schema.get("type", "anything"))


def _named(schema: Schema) -> str:
    if "const" in schema:
        return repr(schema["const"])
    if "properties" in schema or "prefixItems" in schema:
        return str(schema.get("title", _kind(schema)))
    return " ".join(str(schema[word]) for word in ("type", "format") if word in schema) or "anything"


def _list(choices: Iterable[Schema]) -> str:
    names = [_named(choice) for choice in choices]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        number, open = cast("tuple[float, int]", value)
        return f"{number} (not itself)" if open else str(number)
    return repr(value)


def _renamed(name: str, old: Schema, new: Schema) -> str:
    gone = [field for field in old if field not in new]
    return f"; if it was called {gone[0]!r}: msgspec.field(name={gone[0]!r})" if gone and name not in old else ""
