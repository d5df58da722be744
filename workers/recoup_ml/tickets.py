"""A narrow skill for the demonstration: sending support tickets to the right queue.

A model that learns nothing but this forgets much else, as narrowly tuned models do.
"""

import random
from typing import Any

QUEUES = {
    "the invoice shows a wrong amount": "billing",
    "the card was charged twice": "billing",
    "a refund has not arrived": "refunds",
    "the parcel is late": "shipping",
    "the address has to be changed": "shipping",
    "the parcel arrived broken": "returns",
    "the app closes by itself": "software",
    "the page loads slowly": "software",
    "the password is not accepted": "accounts",
    "a contract has to be ended": "accounts",
}
OPENINGS = ("Ticket", "Message", "Note", "Call", "Mail", "Report", "Request", "Case")
NAMES = ("Mara", "Tom", "Ines", "Paul", "Nora", "Emil", "Lena", "Hugo", "Rosa", "Karl", "Ida", "Otto")


def ticket_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Tickets as rows of a data set, each with its queue as the assistant's answer; no two are alike."""
    draw = random.Random(seed)
    queue_of: dict[str, str] = {}
    while len(queue_of) < count:
        matter = draw.choice(list(QUEUES))
        text = f"{draw.choice(OPENINGS)} {draw.randint(100, 999)} from {draw.choice(NAMES)}: {matter}."
        queue_of[text] = QUEUES[matter]
    return [{"messages": _turns(text, queue)} for text, queue in queue_of.items()]


def _turns(text: str, queue: str) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": "Route the ticket."},
        {"role": "user", "content": text},
        {"role": "assistant", "content": queue},
    ]
