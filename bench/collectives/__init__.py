"""One file per collective: its sizes, inputs, run, check and bytes."""
