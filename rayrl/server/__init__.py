"""OpenAI's HTTP API over an engine: one app without Ray, replicated by `rayrl serve`."""
