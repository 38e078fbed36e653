"""Decoding: the state, and the cycle of propose, verify, accept, commit and update; prompts enter by prefill.

May import drafts and everything below them, never convert.
"""
