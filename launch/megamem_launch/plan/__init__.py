"""`megamem plan`: memory, traffic and time of a layout, told before it is run."""
