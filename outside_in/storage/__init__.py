"""Files on the disk: atomic, strict, and whole or refused."""
