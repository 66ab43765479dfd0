"""What is tried on what left: algebra, statistics, gradients turned back; `by_kind.py`: what gets what."""
