"""A trained model at work: loading, completions, evaluation."""
