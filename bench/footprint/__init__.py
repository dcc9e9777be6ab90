"""How many bytes training takes, counted by allocation."""
