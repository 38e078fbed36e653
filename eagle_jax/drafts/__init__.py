"""Drafts: everything that guesses the target's next tokens. protocol.py says what the decoder asks of one."""
