"""Ways into other libraries, a file each. Nothing imports them but who uses that library."""
