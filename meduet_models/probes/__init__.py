"""What content and style know: probes, and how good a swap is."""
