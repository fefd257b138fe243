"""Other libraries' names over mlopt's, for scripts that were written for them."""
