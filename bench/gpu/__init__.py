"""``python -m bench gpu``: one file each for its clock, its contests of kernels, its ranks that issue, and the case."""
