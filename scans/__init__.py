"""One scan: read from its files, placed in the patient, made a volume; whose it is, is the cohort's."""
