"""What ends a recovery, as sentences with a code that the job keeps.

RecoveryError            anything below; `.code` goes into the job's error
├── UnsupportedModel     we cannot find the layers, or the output head is not a linear map
├── IncompatibleModels   student and teacher cannot be compared token by token
├── EmptyDataset         nothing to train or to measure on
├── TeacherUnavailable   the teacher's server does not answer, or answers nonsense
├── TeacherMismatch      the server answers with another model than the teacher
├── TeacherTruncated     the teacher gave no usable answer
├── TeacherContextTooShort  the teacher's server takes shorter sequences than the recovery needs
├── TeacherLogProbsTooFew  the teacher's server tells fewer log-probabilities than the method learns from
├── RolloutsUnavailable  a server of the student does not answer, or refuses its adapter
├── RolloutMismatch      a server of the student draws from another model than the one that learns
├── NonFiniteWeights     a model holds NaN or infinity, or computes it
└── UnsupportedRequest   a combination that would break a promise (zeros filled by a merged adapter)
"""


class RecoveryError(Exception):
    code = "recovery_error"
    may_pass = False
    """Whether the same recovery may succeed when it is tried again."""


class UnsupportedModel(RecoveryError):
    code = "unsupported_model"


class IncompatibleModels(RecoveryError):
    code = "incompatible_models"


class EmptyDataset(RecoveryError):
    code = "empty_dataset"


class TeacherUnavailable(RecoveryError):
    code = "teacher_unavailable"
    may_pass = True


class TeacherMismatch(RecoveryError):
    code = "teacher_mismatch"


class TeacherTruncated(RecoveryError):
    code = "teacher_truncated"


class TeacherContextTooShort(RecoveryError):
    code = "teacher_context_too_short"


class TeacherLogProbsTooFew(RecoveryError):
    code = "teacher_log_probs_too_few"


class RolloutsUnavailable(RecoveryError):
    code = "rollouts_unavailable"
    may_pass = True


class RolloutMismatch(RecoveryError):
    code = "rollout_mismatch"


class NonFiniteWeights(RecoveryError):
    code = "non_finite_weights"


class UnsupportedRequest(RecoveryError):
    code = "unsupported_request"
