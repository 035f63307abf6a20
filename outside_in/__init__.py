"""The harness: the recipe on its top level, machinery in its folders."""
