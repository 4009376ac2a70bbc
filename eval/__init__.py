"""What came out: metrics, chat, plots, experiments, reproduce."""
