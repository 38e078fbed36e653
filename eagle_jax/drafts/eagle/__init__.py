"""EAGLE heads: their configs, their networks, and how they draft. Imports models, tree and the rest of drafts."""
