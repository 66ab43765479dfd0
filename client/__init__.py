"""One hospital: reads its own scans, trains, and releases sums through one gate."""
