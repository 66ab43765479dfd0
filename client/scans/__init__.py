"""Files of a hospital as volumes of known patients."""
