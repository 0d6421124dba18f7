"""A test bed of six teachers that differ, a mixed pool and nine tasks, made by `make.py`."""
