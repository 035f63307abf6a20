"""Text to token files: what prepare_data.py does."""
