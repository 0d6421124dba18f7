"""Ablations: the runs of a set of factors over one cache, and the table that compares them."""
