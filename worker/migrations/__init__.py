"""The ledger's schema, forward only: a release may add to it and never goes back."""
