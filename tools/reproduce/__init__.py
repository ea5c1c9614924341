"""The rows of the paper's tables, trained and set beside the paper."""
