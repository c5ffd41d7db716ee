class UserError(ValueError):
    """Something the user can put right: one sentence naming the file or key, what is wrong and what to do."""


class NotMade(UserError):
    """A file that an earlier step makes is missing or damaged. How to make it, the one who runs the steps can say."""


class MissingExtra(UserError, ImportError):
    """A package that only an extra of memvir brings is not installed."""
