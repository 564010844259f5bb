"""Names of layers, what a traced forward showed of them, and which of them are paired. Plain data."""
