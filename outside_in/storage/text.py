"""A number with its noun."""


def counted(count: int, noun: str, plural: str = "") -> str:
    """Return "1 device", "8 devices" or "2,000 devices"."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"
