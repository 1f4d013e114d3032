"""Release of a finished run: its parts as folders that transformers, diffusers and peft load, with a card."""
