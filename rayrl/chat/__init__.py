"""Convert messages to token ids and back; no other package tokenizes."""
