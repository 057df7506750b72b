"""Words that representations and titles share."""


def counted(count: int, noun: str) -> str:
    """The count with its noun, in the singular for one."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
