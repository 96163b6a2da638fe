"""The traffic of a server: traces of it, and the token buckets that fit it."""
