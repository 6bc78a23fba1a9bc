"""What ROMA is worth, and why: runs, tables and figures of docs/SCIENCE.md."""
