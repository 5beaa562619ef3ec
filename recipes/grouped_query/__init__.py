"""The comparison of grouped-query conversions: its cells, their measurement, tables and figures."""
