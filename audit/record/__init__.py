"""What an audit leaves behind: a row for each artefact, the record, its page and the page to file."""
