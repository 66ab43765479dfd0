"""A site's own books: what left, whom it refused, who withdrew; held against each other."""
