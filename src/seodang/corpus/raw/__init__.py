"""The raw-text corpus of a foundation model: read, cleaned, deduplicated and accounted for."""
