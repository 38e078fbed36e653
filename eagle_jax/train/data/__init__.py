"""Training data: reads records, renders chats, packs documents into sequences, and stores features.

May import train's settings and reports, never its losses or runs.
"""
