"""The OpenAI-compatible server: many tenants on one compressed base, inside vLLM."""
