"""``python -m bench <case>``: measures sparsecoll beside what a user would call instead."""
