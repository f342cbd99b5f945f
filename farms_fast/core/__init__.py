"""What every floor stands on: compiled ops, argument checks, arrays, files, text, progress."""
