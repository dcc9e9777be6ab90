"""What moves bytes between the ranks of a group: one protocol (`base`), one module for each back end."""
