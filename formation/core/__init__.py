"""The ground floor: the words that every other room uses. Nothing here does I/O but `keys`, `config` and `files`."""
