"""The ledger: what each layer kind owns, keeps for backward, and holds only while it runs."""
