"""`python -m recoup_api`: prints the OpenAPI document, as `docs/openapi.json` holds it."""

import json
import sys
import tempfile
from pathlib import Path

from recoup_api.app import create_app
from recoup_jobs.ledger import open_ledger
from recoup_jobs.settings import Settings

with tempfile.TemporaryDirectory() as home:
    settings = Settings(home=Path(home))
    json.dump(create_app(settings, open_ledger(settings)).openapi(), sys.stdout, indent=1, ensure_ascii=False)
    sys.stdout.write("\n")
