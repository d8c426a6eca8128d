"""From text to a trained model: tokenizer, corpus, depth, optimizer, checkpoint, trainer."""
