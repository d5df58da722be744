"""`python -m recoup_server` is `recoup-server`."""

from recoup_server.cli import main

main()
