"""Natural text that is on every machine: the language reference inside Python itself."""

from pydoc_data.topics import topics


def python_documentation() -> list[str]:
    """About 700 kB of English prose with code, PSF licence, the same for one Python release."""
    return [topics[name] for name in sorted(topics)]
