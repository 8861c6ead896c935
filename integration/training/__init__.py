"""The demo's base model: its training text, tokenizer and pretraining."""
