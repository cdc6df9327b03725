"""The losses under other libraries' models: `patch` for the causal language models of Transformers."""
