"""From a row to its caption: prompts, preparation, sampling, KV cache, batch scheduler. Knows nothing of Ray."""
