"""Numbers with their nouns."""


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return "1 device", "8 devices" or "2,000 devices"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
