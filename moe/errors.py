"""What a user can mend, and what a store raises."""

import sys


class UserError(Exception):
  """One line of cause and remedy; tools print it without a traceback and exit with 2."""


_OF_STORES = (("gcsfs.retry", "HttpError"), ("gcsfs.retry", "ChecksumError"), ("aiohttp", "ClientError"),
              ("google.auth.exceptions", "GoogleAuthError"), ("google.api_core.exceptions", "GoogleAPIError"),
              ("tensorflow.errors", "OpError"))


def storage_errors() -> tuple[type[Exception], ...]:
  """For `except`: what a file or an object that cannot be read or written raises, with the clients that are loaded."""
  return (OSError, *(getattr(sys.modules[module], name) for module, name in _OF_STORES
                     if hasattr(sys.modules.get(module), name)))
