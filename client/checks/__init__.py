"""What `meduet-site check` looks at."""
