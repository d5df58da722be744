"""Function calls in a text, as values that can be compared.

Two notations are read: JSON objects with a name and arguments, as chat models write their
tool calls, anywhere in a text; and Python's `name(args)`. The order of keys, white space and
quotes make no difference, nor does `1.0` for `1` in JSON; `true` is no `1`.
"""

import ast
import builtins
import json
import re
import warnings
from decimal import Decimal
from typing import Any

ATTEMPTS = 64
"""How often a call is tried to be read in one text, so that no text takes long."""
LONGEST = 4096
"""Characters of a call in Python's notation."""
UNREADABLE = (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError)
ARGUMENTS = ("arguments", "parameters", "args")

_OPENED = re.compile(r"(?<![\w.])([A-Za-z_][\w.]*)\(")

Call = tuple[str, Any]
"""The name and comparable arguments."""


def keeps_calls(rewrite: str, reference: str) -> bool:
    """Whether both texts hold the same calls, in whatever order and how often."""
    wanted = json_calls(reference)
    if wanted:
        found = json_calls(rewrite)
    else:
        wanted = python_calls(reference)
        found = _calls_of({name for name, _ in wanted}, rewrite)
    try:
        return all(call in found for call in wanted) and all(call in wanted for call in found)
    except RecursionError:
        return False


def json_calls(text: str) -> list[Call]:
    """The calls that JSON objects describe, wherever in the text and in other objects they stand."""
    found, at = [], text.find("{")
    for _ in range(ATTEMPTS):
        if at < 0:
            break
        call, end = _json_call(text, at)
        found += [call] if call else []
        at = text.find("{", end)
    return found


def python_calls(text: str) -> list[Call]:
    """The calls that make up a text, each on its line or in a list; none if it says anything else.

    What calls Python's own functions is code.
    """
    text = text.strip().strip("`")
    opens = len(text) <= LONGEST and _OPENED.match(text.removeprefix("["))
    tree = parsed(text) if opens else None
    calls = [_python_call(node) for statement in tree.body for node in _listed(statement)] if tree else []
    return [call for call in calls if call] if all(calls) else []


def parsed(code: str) -> ast.Module | None:
    """Python's syntax tree; None if the code is not Python, or nested too deep to be read."""
    try:
        with warnings.catch_warnings(action="ignore"):
            return ast.parse(code)
    except UNREADABLE:
        return None


def _json_call(text: str, at: int) -> tuple[Call | None, int]:
    """The call that the object at `at` describes, and where to read on: behind it, or else inside of it."""
    try:
        value, end = _JSON.raw_decode(text, at)
        key = next(key for key in ARGUMENTS if key in value)
        arguments = value[key]
        if isinstance(arguments, str):
            arguments = _JSON.decode(arguments)
        return (str(value["name"]), arguments), end
    except (*UNREADABLE, StopIteration, KeyError):
        return None, at + 1


def _number(digits: str) -> tuple[str, Decimal]:
    """Python holds `True == 1`; JSON does not."""
    return "number", Decimal(digits)


_JSON = json.JSONDecoder(parse_int=_number, parse_float=_number)


def _listed(statement: ast.stmt) -> list[ast.AST]:
    value = statement.value if isinstance(statement, ast.Expr) else statement
    return list(value.elts) if isinstance(value, ast.List | ast.Tuple) else [value]


def _python_call(node: ast.AST) -> Call | None:
    if not isinstance(node, ast.Call):
        return None
    try:
        name = ast.unparse(node.func)
        keywords = {keyword.arg: ast.dump(keyword.value) for keyword in node.keywords}
        return None if hasattr(builtins, name) else (name, ([*map(ast.dump, node.args)], keywords))
    except RecursionError:
        return None


def _calls_of(names: set[str], text: str) -> list[Call]:
    """The calls of the named functions, wherever in the text they stand."""
    starts = [match.start() for match in _OPENED.finditer(text) if match[1] in names]
    segments = (text[start : start + LONGEST] for start in starts[: ATTEMPTS // 4])
    return [call for segment in segments if (call := _first_call(segment))]


def _first_call(segment: str) -> Call | None:
    """The call at the segment's start: up to the first closing bracket with which it can be parsed."""
    for end in list(re.finditer(r"\)", segment))[:ATTEMPTS]:
        calls = python_calls(segment[: end.end()])
        if calls:
            return calls[0]
    return None
