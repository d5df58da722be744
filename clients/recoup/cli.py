"""`recoup`: the console entry. Commands: `_commands.py`; what they print: `_render.py`, `_watch.py`.

The SDK alone needs neither typer nor rich; where they are missing, this says how to get them.
"""

import sys


def main() -> None:
    """Run the command line; exits with the code that `_commands.py` documents."""
    try:
        from recoup._commands import app
    except ModuleNotFoundError as error:
        if error.name not in {"typer", "rich"}:
            raise
        print(f"The command line needs {error.name}: pip install 'recoup[cli]'", file=sys.stderr)
        sys.exit(2)
    app()


if __name__ == "__main__":
    main()
