"""One file per published schema; each turns a row into an `Example`."""
