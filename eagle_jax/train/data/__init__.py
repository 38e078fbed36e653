"""Training data: records, chats and their templates, documents packed into sequences, features written once.

May import train's settings and reports, never its losses or runs.
"""
