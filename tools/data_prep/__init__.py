"""Text to token files: records (no torch), encoding, and the files of a data set. What the tools share."""
