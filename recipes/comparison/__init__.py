"""What comparisons of many cells share: named cells, a store that a stopped run goes on from, tables, figures."""
