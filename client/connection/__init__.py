"""How a site reaches the centre: keys, certificates, SuperNode."""
