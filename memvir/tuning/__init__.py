"""The search for a variant's settings, on classes that no table shows."""
