"""The science with another `recipe`: put before the real one on the path, it shadows that module alone."""

import sys
from pathlib import Path

__path__ += [
    str(real)
    for entry in sys.path
    if (real := Path(entry or ".").resolve() / "recoup_ml").is_dir() and real != Path(__file__).parent
]
