"""Who may do what: identities, signed messages, bounded decoding of plain data."""
