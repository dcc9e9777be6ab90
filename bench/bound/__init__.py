"""``python -m bench bound``: plans' predicted times over what no schedule can beat, on random cases."""
