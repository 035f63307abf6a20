"""Names that programs take and reports show."""

COMPARISON = "comparison.png"  # unless another name is asked for
X_LABELS = {  # where runs are compared
    "tokens": "training tokens",
    "steps": "global step",
    "seconds": "seconds of training steps",
}
