"""The codes that failed jobs keep are promises: clients compare them."""

import pytest

from recoup_ml import errors


@pytest.mark.parametrize(
    ("error", "code", "may_pass"),
    [
        (errors.IncompatibleModels, "incompatible_models", False),
        (errors.NonFiniteWeights, "non_finite_weights", False),
        (errors.EmptyDataset, "empty_dataset", False),
        (errors.TeacherUnavailable, "teacher_unavailable", True),
        (errors.TeacherTruncated, "teacher_truncated", False),
        (errors.UnsupportedRequest, "unsupported_request", False),
    ],
)
def test_a_code_is_what_the_documentation_says(error, code, may_pass):
    assert (error.code, error.may_pass) == (code, may_pass)
