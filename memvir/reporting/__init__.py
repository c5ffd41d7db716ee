"""What people look at: tables, curves, t-SNE figures, retrieval pictures, and one page that holds them all.

Functions take paths, data frames and arrays, and know nothing of where the repository keeps them. The same inputs give
the same bytes. Nothing here imports torch.
"""

from memvir.extras import require

require("experiment", "pandas", "pydantic")
