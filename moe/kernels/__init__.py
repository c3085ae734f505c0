"""One operation a file, pure functions on local arrays, with the reference beside the fast form."""
