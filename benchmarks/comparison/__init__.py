"""The parts of `benchmarks/method.py`: what is compared, how a run is made, judged and reported."""
