"""Programs as agents: an OpenAI-compatible endpoint whose requests are turns of an episode."""
