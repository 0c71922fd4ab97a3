"""Finding peers and talking to them.

`transport` is the interface; `hivemind_transport` and `memory_transport` implement it, each
importing what it needs when it is used. `records` and `directory` say who serves what.
"""
