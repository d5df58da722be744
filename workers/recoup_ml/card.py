"""The model card of what a recovery made: `README.md` as Hugging Face reads it.

YAML between two `---` lines tells the hub what this is and what it was made from; the Markdown below
says what was damaged, what came back, how to load it, what it cannot be trusted with, and how to
repeat it. The licence is the base model's, so the card names none.
"""

import json
from functools import cache
from typing import Final

from jinja2 import Environment, PackageLoader, StrictUndefined

from recoup.schemas import Report
from recoup_ml.page import VERDICTS, day, number, percent
from recoup_ml.plan import Form

DAMAGES: Final = {
    "finetuning": "lost general ability through fine-tuning",
    "quantization": "lost ability through quantization",
    "pruning": "lost ability through pruning",
    "none": "shows no damage in its weights",
}


def model_card(report: Report, base_model: str, kind: Form, name: str) -> str:
    """The card in Markdown; the same report gives the same text.

    Args:
        base_model: what an adapter is loaded onto, or what a merged model was made from (hub id or path).
        kind: `adapter` for a PEFT folder, another form for a whole model.
        name: the title, and the path in the loading snippet.
    """
    return (
        _environment()
        .get_template("card.md.jinja")
        .render(
            report=report,
            base_model=base_model,
            kind=kind,
            name=name,
            verdict=VERDICTS[report.outcome],
            damage=DAMAGES[report.damage.kind],
        )
    )


@cache  # which keeps the template's compiled form
def _environment() -> Environment:
    environment = Environment(  # Markdown, not HTML: nothing from prompts or answers enters
        loader=PackageLoader("recoup_ml", ""),
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(cell=cell, day=day, number=number, percent=percent, quoted=quoted)
    return environment


def cell(text: str) -> str:
    """Text that stays in one cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def quoted(text: str) -> str:
    """A string in double quotes, as JSON, YAML and Python all read it."""
    return json.dumps(text)
