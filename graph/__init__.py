"""The intervention graph: plain data, and the rules that make it mean one thing only."""
