"""The commands of ``farms-fast`` besides ``analyze``, and what all of them share."""
