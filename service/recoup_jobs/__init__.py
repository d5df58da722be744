"""What a recovery is between request and verdict: its row, its history, its files, its hint to a worker.

Read `lifecycle.py` first (which state may follow which), then `ledger.py` (who may write
what, and when), then `preflight.py` (what is refused before a row is written).
No torch and no web framework here.
"""
