"""What ``compare`` is made of: parts that are measured once and kept, tables, figures, pages."""
