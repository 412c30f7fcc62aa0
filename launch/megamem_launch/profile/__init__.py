"""``megamem profile``: how fast a configuration trains here, and where time, bytes and memory go."""
