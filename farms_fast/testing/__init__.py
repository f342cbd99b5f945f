"""The truth that tests compare with."""
