"""What a run needs, whether it can learn, where it broke."""
