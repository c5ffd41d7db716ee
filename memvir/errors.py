class UserError(ValueError):
    """Something the user can put right: one sentence naming the file or key, what is wrong and what to do."""
