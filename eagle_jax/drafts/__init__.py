"""Drafts: everything that guesses the target's next tokens; protocol.py says what the decoder asks of one.

May import models, tree and what lies below them, never decode or convert.
"""
