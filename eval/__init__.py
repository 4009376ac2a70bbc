"""What came out: perplexity, reasoning, chat, plots, experiments, reproduce."""
