"""One run and what stands around it: settings, identity, the loop, checkpoints, several processes, evaluation."""

from memvir.extras import require

require("experiment", "filelock", "pandas", "pydantic", "ruamel.yaml")
