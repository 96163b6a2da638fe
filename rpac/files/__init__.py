"""Files and folders: what is published whole or not at all, and a cache of what was made before."""
