"""What a client of one OpenAPI document would stumble over in a later one.

    python -m recoup_api.compatibility OLD NEW      prints a line each; exits with 1 if there is any

A client sends what it sent before and reads what it read before. So a request may not be asked for more or
refused for what was allowed, an answer may not lose a member or change its type, and no operation may go.
What is added breaks nobody: fields that may be left out, members, routes, statuses, longer enums of answers.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Json = dict[str, Any]
MAXIMA = ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties")
MINIMA = ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties")


def breaks(old: Json, new: Json) -> Iterator[str]:
    for path, operations in old["paths"].items():
        for method, operation in operations.items():
            now = new["paths"].get(path, {}).get(method)
            place = f"{method} {path}"
            if now is None:
                yield f"{place} is gone"
            else:
                yield from _of_operation(place, operation, now)
    schemas = new["components"]["schemas"]
    for name, schema in old["components"]["schemas"].items():
        yield from _of_schema(name, schema, schemas.get(name, {}), sent=name.endswith("Input"))


def _of_operation(place: str, old: Json, new: Json) -> Iterator[str]:
    known, now = _parameters(old), _parameters(new)
    for where, parameter in known.items():
        if where not in now:
            yield f"{place} lost {where[1]}"
        else:
            yield from _narrowed(f"{place} {where[1]}", parameter["schema"], now[where]["schema"])
    demanded = {where for where, parameter in now.items() if parameter.get("required")}
    was = {where for where, parameter in known.items() if parameter.get("required")}
    yield from (f"{place} demands {name}" for _, name in sorted(demanded - was))
    for status in old["responses"]:
        if status.startswith("2") and status not in new["responses"]:
            yield f"{place} answers {status} no more"


def _parameters(operation: Json) -> dict[tuple[str, str], Json]:
    return {(one["in"], one["name"]): one for one in operation.get("parameters", ())}


def _of_schema(name: str, old: Json, new: Json, sent: bool) -> Iterator[str]:
    """`sent`: by clients; else it is what they read."""
    fields, now = old.get("properties", {}), new.get("properties", {})
    yield from (f"{name} lost {field}" for field in fields.keys() - now.keys())
    required, demanded = set(old.get("required", ())), set(new.get("required", ()))
    if sent:
        yield from (f"{name} demands {field}" for field in sorted(demanded - required))
    else:
        yield from (f"{name} may lack {field}" for field in sorted(required - demanded) if field in now)
    for field in fields.keys() & now.keys():
        check = _narrowed if sent else _changed
        yield from check(f"{name}.{field}", fields[field], now[field])


def _narrowed(place: str, old: Json, new: Json) -> Iterator[str]:
    """What was allowed to be sent and is no more."""
    yield from (f"{place} refuses {kind}" for kind in sorted(_kinds(old) - _kinds(new)) if _kinds(new))
    if "enum" in new and (gone := [value for value in old.get("enum", ()) if value not in new["enum"]]):
        yield f"{place} refuses {', '.join(map(str, gone))}"
    for bound in MAXIMA:
        if bound in new and new[bound] < old.get(bound, float("inf")):
            yield f"{place} has a lower {bound}"
    for bound in MINIMA:
        if bound in new and new[bound] > old.get(bound, float("-inf")) and new[bound] > 0:
            yield f"{place} has a higher {bound}"
    if "pattern" in new and new["pattern"] != old.get("pattern"):
        yield f"{place} has another pattern"


def _changed(place: str, old: Json, new: Json) -> Iterator[str]:
    """What is read now and was not to be expected."""
    yield from (f"{place} may be {kind}" for kind in sorted(_kinds(new) - _kinds(old)) if _kinds(old))


def _kinds(schema: Json) -> set[str]:
    """The types and models that a value may be of; empty: any."""
    inner = [part for word in ("anyOf", "oneOf", "allOf") for part in schema.get(word, ())]
    if inner:
        return set().union(*map(_kinds, inner))
    if "$ref" in schema:
        return {schema["$ref"].rpartition("/")[2]}
    own = schema.get("type", [])
    return {own} if isinstance(own, str) else set(own)


if __name__ == "__main__":
    found = sorted(breaks(*(json.loads(Path(path).read_text()) for path in sys.argv[1:3])))
    print("\n".join(f"breaks clients: {line}" for line in found) or "breaks no client")
    raise SystemExit(bool(found))
