"""Many runs at once: what is out of date, side by side on this machine or on a cluster, recorded in DVC."""
