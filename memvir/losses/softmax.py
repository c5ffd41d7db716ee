from memvir.losses.cross_entropy import CrossEntropyLoss


class SoftMax(CrossEntropyLoss):
    """Cross-entropy of the plain inner product <e, w>; nothing is normalised."""

    display_name = "SoftMax"
    normalised = False
    factor = 1.0
