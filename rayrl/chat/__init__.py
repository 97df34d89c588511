"""Messages into ids and back; the only package that tokenizes."""
