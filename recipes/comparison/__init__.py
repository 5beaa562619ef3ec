"""Common parts of comparisons: named cells, a store from which a stopped run continues, tables, figures."""
