import pickle

import pytest

from recoup.schemas import ProblemItem
from recoup_jobs import errors
from recoup_jobs.errors import RecoupError, Unprocessable

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, RecoupError)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_survives_pickling(kind):
    copy = pickle.loads(pickle.dumps(kind("a_code", "A sentence.")))
    assert (type(copy), copy.code, str(copy), copy.status) == (kind, "a_code", "A sentence.", kind.status)


def test_findings_survive_pickling():
    item = ProblemItem(pointer="/student", code="model_not_found", message="No such folder.")
    copy = pickle.loads(pickle.dumps(Unprocessable("model_not_found", "No such folder.", [item])))
    assert copy.items == [item]
