"""The machines that programs are compiled on and for: chips, this host, its toolchain, and where arrays lie."""
