"""``hvpop`` on the command line; needs the extra ``cli``."""

from __future__ import annotations


def main() -> None:
    """Run the command; what ``pip`` installs as ``hvpop``."""
    try:
        from .commands import app
    except ImportError as error:
        if error.name is None or error.name.partition(".")[0] not in ("typer", "jinja2", "rich"):
            raise
        raise SystemExit(
            f"hvpop: the command line needs {error.name}: pip install 'hvpop[cli]'"
        ) from error
    app()


__all__ = ["main"]
