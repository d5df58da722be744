"""The REST service: requests in, rows and files out.

`app.py` wires everything, `guard.py` decides who may enter, `problems.py` turns every error
into an answer; the routes lie by resource in `recoveries.py`, `files.py` and `ops.py`.
"""
