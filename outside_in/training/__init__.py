"""One run from its set-up to its end."""
