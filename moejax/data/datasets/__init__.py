"""The sources of examples, one file each."""
