"""From prompts to pictures: tokenizer, text encoders, the session's loop, decoder."""
