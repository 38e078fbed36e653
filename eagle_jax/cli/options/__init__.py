"""What options build: parser pieces shared by the commands, and the models, drafts, sampling and trees that they name.

May import everything that the commands may, but no command.
"""
