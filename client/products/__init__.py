"""What a site makes of its scans with weights, as files that stay: volumes, label maps, embeddings."""
