"""Other people's environments and rows as ours, and ours as theirs."""
