"""Counts, records and reports of a run: counters (on the device), record, writer, tracker, reader, accounting."""
