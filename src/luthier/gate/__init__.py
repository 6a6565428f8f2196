"""Data checks: rules, near-duplicates, personal data, reports and cleaning."""
