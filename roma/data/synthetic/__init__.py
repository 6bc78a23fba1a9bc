"""Generated datasets whose answers can be verified: handwritten digits and charts."""
