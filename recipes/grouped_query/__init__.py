"""The comparison of grouped-query conversions: its cells, how one is measured, and what is made of them."""
