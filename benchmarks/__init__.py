"""What rlsys costs over the bare libraries, as ratios measured side by side in one run: `python -m benchmarks`.

Times of shared machines move by factors from minute to minute, so no figure here is an absolute one: both sides of a
comparison are measured in turn, A B A B ..., and what is reported is the median of the ratios of neighbours.
"""
