"""Other libraries agree with us, or are agreed with. Skipped aloud where they are not installed."""
