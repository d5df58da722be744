"""Chat templates, read with suspicion: what a model brought along is a program, and a worker will run it.

    {% for i in range(99999) %}{% for j in range(99999) %}…      takes the machine (CVE-2025-61620)
    {{ x.__init__.__globals__ }}                                 takes the process (CVE-2026-5760)

A template is parsed, every name in it looked at, and then rendered once on a short conversation, in the
sandbox that transformers uses too, in a process of its own that may take little time and memory.

This module is also that process: `python -m recoup_jobs.chat_templates`, the template on standard input.
"""

import re
import resource
import subprocess
import sys
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from recoup_jobs.errors import Unprocessable

LONGEST, LONGEST_ANSWER = 64 << 10, 1 << 20
CPU_SECONDS, MEMORY_BYTES = 1, 512 << 20
PATIENCE_SECONDS = 20.0
"""On the clock, for a machine that has other work."""
DUNDER = re.compile(r"__\w+__")
FINE, REFUSED, EXPENSIVE = 0, 3, 4
"""Exit codes of the process that renders. One that is killed took too much as well."""
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CONVERSATION = [
    {"role": "user", "content": "What is a tide?"},
    {"role": "assistant", "content": "The sea's daily rise and fall."},
    {"role": "user", "content": "Why?"},
]


def check(template: Any) -> None:
    """`template`: text, or a list of named ones. Raises `template_refused`, `template_too_expensive`."""
    named = template if isinstance(template, list) else [{"template": template}]
    for one in named:
        text = one.get("template") if isinstance(one, dict) else one
        if isinstance(text, str):
            _check(text)


@lru_cache(maxsize=64)
def _check(text: str) -> None:
    """What was found harmless once, as a teacher's and its student's template, is not rendered again."""
    if len(text) > LONGEST:
        raise _expensive(f"it has {len(text)} characters, {LONGEST} are read")
    try:
        _refuse_hidden_names(_environment().parse(text))
    except (TemplateSyntaxError, RecursionError) as error:
        raise _refused(f"it is no Jinja template: {str(error)[:200]}") from None
    command = [sys.executable, "-m", "recoup_jobs.chat_templates"]
    try:
        done = subprocess.run(
            command, input=text.encode(), capture_output=True, timeout=PATIENCE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise _expensive(f"it is not rendered after {PATIENCE_SECONDS:g} seconds") from None
    if done.returncode == REFUSED:
        raise _refused("it asks the sandbox for what is not a template's business")
    if done.returncode != FINE:
        raise _expensive(f"a short conversation takes more than {CPU_SECONDS} s or {MEMORY_BYTES >> 20} MiB")


def _refuse_hidden_names(tree: nodes.Template) -> None:
    """Attributes of Python's own, however they are reached: `x.__a__`, `x["__a__"]`, `x|attr("__a__")`."""
    attributes = (node.attr for node in tree.find_all(nodes.Getattr))
    names = (node.name for node in tree.find_all(nodes.Name))
    texts = (node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str))
    for name in (*attributes, *names, *texts):
        if found := DUNDER.search(name):
            raise _refused(f"it names {found.group()[:50]}")


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.globals |= {"raise_exception": _raise, "strftime_now": lambda _format: "1 January 2026"}
    return environment


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}`, by which templates mark what an assistant says."""

    tags = {"generation"}  # noqa: RUF012 - as the library has it

    def parse(self, parser: Parser) -> Any:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _refused(why: str) -> Unprocessable:
    return Unprocessable("template_refused", f"the chat template is refused: {why}")


def _expensive(why: str) -> Unprocessable:
    return Unprocessable("template_too_expensive", f"the chat template takes too much: {why}")


def _render(text: str) -> int:
    """The exit code. That a conversation does not suit a template, which may raise, is no fault of its."""
    values = {
        "messages": CONVERSATION,
        "add_generation_prompt": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    length = 0
    try:
        for piece in _environment().from_string(text).generate(**values):
            length += len(piece)
            if length > LONGEST_ANSWER:
                return EXPENSIVE
    except SecurityError:
        return REFUSED
    except (OverflowError, MemoryError, RecursionError):  # the sandbox's `range` ends at 100 000
        return EXPENSIVE
    except Exception:
        return FINE
    return FINE


if __name__ == "__main__":
    spent = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(spent.ru_utime + spent.ru_stime) + 1 + CPU_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    raise SystemExit(_render(sys.stdin.read()))
