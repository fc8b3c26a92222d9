"""Records as tokenized examples: messages, chat template, loss mask, tokens."""
