"""The centre as processes that are kept up."""
