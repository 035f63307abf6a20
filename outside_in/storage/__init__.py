"""Files on the disk: atomic, strict, complete or refused."""
