"""What a start-up kit says in words: the page that a hospital's IT reads, and site.yaml to be filled in."""

from datetime import datetime

from federation.keys.kits import Connection


def readme_text(connection: Connection, fingerprint: str, ends: datetime, with_key: bool) -> str:
    """README.txt, one page with the exact commands."""
    site = connection.site
    key = (
        "This kit holds the private key of your site: whoever has it can pass for you. Do not mail it\n"
        "openly; delete the zip once it is installed."
        if with_key
        else f"This kit holds no secret. Your private key is where `meduet-site request {site}` made it."
    )
    return f"""\
FedMeDUET: site {site} of consortium {connection.consortium}

{key}

1. Install, into a folder of the account that will run FedMeDUET:

     meduet-site install {site}.zip --into /etc/meduet

   It prints a fingerprint of the consortium's authority. Telephone the centre, by a number that you did
   not get with this kit, and compare all of it. The centre that made this kit says:

     {fingerprint}

2. Fill in /etc/meduet/site.yaml: where the scans are, and what your hospital agrees to.

3. Look at everything, above all at who the patients are taken to be; when that is right, say so:

     meduet-site check --config /etc/meduet/site.yaml
     meduet-site check --config /etc/meduet/site.yaml --confirm-patients

4. Read each plan that the centre publishes, and approve it (nothing runs before):

     meduet-site plan show PLAN_FILE --config /etc/meduet/site.yaml
     meduet-site plan approve HASH --config /etc/meduet/site.yaml

5. Start. Connections go out to {connection.server} only; nothing listens for the outside:

     meduet-site start --config /etc/meduet/site.yaml

6. Whenever you like, read what left, and check that nobody changed the record:

     meduet-site journal show --config /etc/meduet/site.yaml
     meduet-site journal verify --config /etc/meduet/site.yaml

Your certificate ends on {ends:%Y-%m-%d}; the centre will send you another before
(`meduet-site install {site}.pem --into /etc/meduet`).
"""


def settings_text(connection: Connection) -> str:
    """site.yaml, to be filled in: `check` fails until it is."""
    return f"""\
# FedMeDUET, site {connection.site} of consortium {connection.consortium}. It never leaves the hospital.
name: {connection.site}
data_root: FILL-IN            # folder of scans (NIfTI or DICOM); only ever read
state_dir: state              # what FedMeDUET writes: cache, ledger, journal, approvals, log
keys_dir: keys                # what `meduet-site install` wrote
device: auto                  # auto | cpu | cuda
minimum_cohort: 10            # fewest patients whose statistics may leave together
allow_non_private: false      # true: bounded sums without differential privacy may leave
epsilon_ceiling: 0            # in its place: the most that releases with noise may cost a patient
allow_exact_sums: ""          # a sentence (client/consent/exact_sums.py): sums over few patients may leave
plan_approval: required       # a plan runs here only after `meduet-site plan approve`
allowed_hours: ""             # "18:00-06:00": work begins only in these hours, local time; empty: always
"""
