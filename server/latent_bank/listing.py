"""What is in a latent bank, as plain values: for `meduet-server bank list` and the page.

What this file does not do: change anything, or open a record.
"""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from server.latent_bank.bank import LatentBank
from server.latent_bank.tables import STATES

_AT_ONCE = 500


def summary(latent_bank: LatentBank) -> dict[str, Any]:
    """Counts per site, layout, models. Names no item."""
    origins = latent_bank.tables.origins().values()
    withdrawn = latent_bank.tables.withdrawn_sites()
    layout = latent_bank.tables.meta("layout")
    sites = {
        site: {
            **{state: latent_bank.tables.count(state, site) for state in STATES},
            "withdrawn": latent_bank.tables.num_buried(site),
            "site_withdrew": site in withdrawn,
            "policies": sorted({origin.policy for origin in origins if origin.site == site}),
            "plans": sorted({origin.plan for origin in origins if origin.site == site}),
            "rounds": sorted({origin.round for origin in origins if origin.site == site}),
        }
        for site in sorted({origin.site for origin in origins})
    }
    return {
        "folder": str(latent_bank.folder),
        "patient_data": latent_bank.patient_data,
        "items": len(latent_bank),
        "layout": None if layout is None else json.loads(layout),
        "sites": sites,
        "terms": {
            plan: terms
            for plan in sorted({origin.plan for origin in origins})
            if (terms := latent_bank.terms_of(plan))
        },
        "models": [dataclasses.asdict(model) for model in latent_bank.models()],
    }


def items(latent_bank: LatentBank) -> Iterator[dict[str, Any]]:
    """Every item with where it comes from, in the order of training, those that are not kept last."""
    for state in STATES:
        for origin in latent_bank.tables.origins().values():
            numbers = latent_bank.tables.numbers(origin.origin, state).tolist()
            for first in range(0, len(numbers), _AT_ONCE):
                some = numbers[first : first + _AT_ONCE]
                found = latent_bank.tables.numbered(some)
                for item in (found[number] for number in some if number in found):
                    yield {
                        "item": item.name,
                        "site": origin.site,
                        "round": origin.round,
                        "policy": origin.policy,
                        **latent_bank.terms_of(origin.plan),
                        "plan": origin.plan,
                        "encoder": origin.encoder,
                        "sha256": item.sha256,
                        "state": item.state,
                    }
