"""Environments of other libraries by name, `env.name=SCHEME:ID`; each needs its extra."""
