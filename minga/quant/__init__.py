"""Number formats smaller than float32, and modules that compute from them."""
