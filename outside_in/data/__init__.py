"""Token files, where they come from, and the batches cut from them."""
