"""Which requests form the next batch."""
