"""Everything that stands on disk, one file per format."""
