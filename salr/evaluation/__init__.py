"""What a model is worth after packing: perplexity, agreement with its source, and the page that shows it."""
