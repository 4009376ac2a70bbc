"""What models learn from: text sources, tokenizer, packing, chat masks, problems, traces."""
