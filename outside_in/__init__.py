"""The harness: on its top level the recipe of a training step, in its folders the machinery around it."""
