"""Overrides with which a simulated run takes seconds: small volumes, a small network, small cohorts."""

SMALL_NETWORK = (
    "volumes.spacing_mm=[6,8,8]",
    "volumes.shape=[32,24,24]",
    "style.minimum_cohort=2",
    "network.width=24",
    "network.depth=1",
    "network.heads=2",
    "network.decoder_width=12",
    "network.decoder_depth=1",
    "network.decoder_heads=2",
)
