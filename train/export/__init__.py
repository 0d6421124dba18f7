"""Finished students in forms that others load without this package."""
