"""The science of a recovery: torch, transformers and peft, and no word of queues, webs or databases.

Read `recipe.py` first: it is the table of contents of a recovery.
"""
