"""Speed and memory beside the peers; `python -m experiments.benchmark` runs them."""
