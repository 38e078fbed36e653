"""Training data: records, chats and their templates, documents laid out in sequences, features written once.

May import train's settings and reports, never its losses or runs.
"""
