"""What can be wrong with what a user gives, as opposed to a mistake in the plugin."""


class UserError(ValueError):
    """Something given cannot be used: a config, dataset, image or weights file.

    The message names the thing, the value and what would be right. The scripts print it as one line
    and end with exit code 2.
    """


class ConfigError(UserError):
    """A config, overlay or override that does not exist or does not fit; the message says which."""
