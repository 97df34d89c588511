"""OpenAI's HTTP interface over an engine: one app, without Ray, that `rayrl serve` replicates."""
