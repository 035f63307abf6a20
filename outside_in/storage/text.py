"""Numbers as people read them."""


def counted(count: int, noun: str, plural: str = "") -> str:
    """Return "1 device", "8 devices" or "2,000 devices"."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def sized(num_bytes: int) -> str:
    """Return a size with two or three digits, such as "210 B", "2.1 kB" or "20 GB"."""
    size, units = float(num_bytes), ["B", "kB", "MB", "GB"]
    while size >= 999.5 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:,.0f} {units[0]}" if size >= 9.95 or units[0] == "B" else f"{size:.1f} {units[0]}"
