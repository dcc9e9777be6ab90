"""``python -m bench balance``: what balancers and predictors make of recorded and drawn routings, without processes."""
