"""Which tasks a training run plays."""
