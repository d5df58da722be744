"""What a chat template may not ask for, and what the templates that are about do ask for."""

import time

import pytest

from recoup_jobs.chat_templates import check
from recoup_jobs.errors import Unprocessable

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = "{% for m in messages %}{% generation %}{{ m.content | trim }}{% endgeneration %}{% endfor %}"
STRICT = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('begin with system') }}{% endif %}"
DATED = "{%- set today = strftime_now('%d %b %Y') -%}{{ bos_token }}{{ today }}{{ tools | tojson }}"


@pytest.mark.parametrize("template", [CHATML, MARKED, STRICT, DATED, "", None, 7, "{{ messages }}"])
def test_what_templates_do_is_accepted(template):
    check(template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages['__class__'] }}",
        "{{ messages | attr('__class__') }}",
        "{% set name = '__cla' ~ 'ss__' %}{{ messages | attr('__init__') }}",
        "{{ messages.append(1) }}",
        "{% if %}",
        [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": "{{ x.__globals__ }}"}],
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_not_a_templates_business_is_refused(template):
    with pytest.raises(Unprocessable) as refusal:
        check(template)
    assert refusal.value.code == "template_refused"


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{{ 'xxxxxxxxxxxxxxxxxxxxxxx' }}{% endfor %}",
        "{{ 'x' * 10**9 }}",
        "{{ 9**(9**(9**9)) }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "x" * 70_000,
    ],
    ids=lambda value: value[:40],
)
def test_what_takes_too_much_is_told_soon(template):
    began = time.process_time()
    with pytest.raises(Unprocessable) as refusal:
        check(template)
    assert refusal.value.code == "template_too_expensive"
    assert time.process_time() - began < 1
