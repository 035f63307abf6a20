"""Token files and the batches cut from them; where token files come from."""
