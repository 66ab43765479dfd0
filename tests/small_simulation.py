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
    "network.code_size=8",
)


def small_simulation(
    hospitals: int = 2, patients: int = 9, paired: int = 3, rounds: int = 2, steps_per_round: int = 2
) -> list[str]:
    """A whole simulation on coarse phantoms, in this process."""
    return [
        f"hospitals.num_hospitals={hospitals}",
        f"hospitals.patients={patients}",
        f"hospitals.paired={paired}",
        "hospitals.resolution_mm=4",
        *SMALL_NETWORK,
        f"training.rounds={rounds}",
        f"training.steps_per_round={steps_per_round}",
        "training.batch_size=4",
        "device=cpu",
        "engine.workers=1",
    ]
