"""Questions about a run: what it will need, whether it can learn, where it broke."""
