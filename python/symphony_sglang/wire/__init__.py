"""Bytes on the network: page transfer between workers, and the feed of what each holds."""
