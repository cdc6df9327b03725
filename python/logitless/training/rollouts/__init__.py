"""On-policy training: completions that the model samples while it trains, their rewards and advantages."""
