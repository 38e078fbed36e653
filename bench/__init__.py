"""What the decoder costs on accelerators: programs compiled without the device, and times on it where there is one."""
