"""Images from where they lie to training batches: sources, archives, index, decoded pixels, crops."""
