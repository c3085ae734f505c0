"""What a user can mend."""


class UserError(Exception):
  """One line of cause and remedy; tools print it without a traceback and exit with 2."""
