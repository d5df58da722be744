"""What kinds of jobs there are. A job's id begins with its kind, so it says what the job is wherever it goes.

All kinds share the ledger, the queue and the workers; a diagnosis is kept as the request of the recovery
whose first stage it is.
"""

import re
import secrets
from typing import Final, Literal

JobKind = Literal["recovery", "diagnosis"]
PREFIXES: Final[dict[JobKind, str]] = {"recovery": "rec_", "diagnosis": "dia_"}
JOB_ID = re.compile(rf"(?:{'|'.join(PREFIXES.values())})[0-9a-f]{{24}}")


def new_id(kind: JobKind) -> str:
    return f"{PREFIXES[kind]}{secrets.token_hex(12)}"


def kind_of(id: str) -> JobKind:
    """Of a job's id; what is none counts as a recovery's."""
    return next((kind for kind, prefix in PREFIXES.items() if id.startswith(prefix)), "recovery")
