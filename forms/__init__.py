"""What comes from elsewhere in writing: numbers in a range, names of known letters, strict JSON and YAML."""
