"""What a runner's exit code tells its supervisor. Any code that is not here is a crash."""

ENDED = 0
"""The ledger knows how the job ended, or that it is to be tried again."""
STOPPED = 75
"""Asked by SIGTERM, the runner stopped where a successor goes on (`EX_TEMPFAIL` of sysexits.h).

The ledger was told nothing: it is the supervisor's to say whether the job is released or cancelled.
"""
